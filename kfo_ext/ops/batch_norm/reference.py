"""Batch norm in plain torch: short, right to any order, the ground truth of the kernels.

It is also what `batch_norm_relu` runs in forward mode, and under the other transforms that operators have no rules for.
"""

from __future__ import annotations

from torch import Tensor


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float | Tensor, relu: bool = True) -> Tensor:
    """relu(weight * (x - mean) * (variance + eps)^-1/2 + bias), statistics per task and channel over the rows.

    Args:
        x: (tasks, rows, channels).
        weight: (tasks or 1, channels).
        bias: (tasks or 1, channels).
        eps: a number, or one that broadcasts with (tasks, 1, channels).
        relu: whether negative values become zero.

    Returns:
        y: (tasks, rows, channels).
    """
    d = x - x.mean(1, keepdim=True)
    rstd = (d.square().mean(1, keepdim=True) + eps).rsqrt()
    z = d * rstd * weight.unsqueeze(1) + bias.unsqueeze(1)
    return z.relu() if relu else z
