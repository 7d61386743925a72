"""`batch_norm_relu`: batch norm by the statistics of each task's own batch, then ReLU, for all tasks at once."""

from __future__ import annotations

from torch import Tensor

from kfo_ext.ops.batch_norm import reference
from kfo_ext.ops.batch_norm.autograd import BATCH_NORM, BatchNormFamily
from kfo_ext.ops.dispatch import Operator
from kfo_ext.ops.operands import check_dimensions

OPERATOR = Operator(("x", "weight", "bias"), {"native": BATCH_NORM}, ("cpu", "cuda"))


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> None:
    check_dimensions("x", x, ("tasks", "rows", "channels"))
    tasks, rows, channels = x.shape
    if rows < 2:
        raise ValueError(
            f"x: expected at least 2 rows, got shape {tuple(x.shape)}: statistics are those of the rows, "
            "and of one row nothing but the bias would remain"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        shape = tuple(parameter.shape)
        if len(shape) != 2 or shape[0] not in (1, tasks) or shape[1] != channels:
            raise ValueError(f"{name}: expected shape ({tasks} or 1, {channels}) for x {tuple(x.shape)}, got {shape}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps!r}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu: expected a bool, got {type(relu).__name__}")


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, relu: bool = True, backend: str = "auto"
) -> Tensor:
    """relu(weight * (x - mean) * (variance + eps)^-1/2 + bias), differentiable to any order by every operand.

    mean and variance (biased) are those of the rows, for each task and channel: never running ones. Derivatives to the
    second order are compiled; from the third on they are plain torch, which recomputes.

    Args:
        x: (tasks, rows, channels), channels-last; other strides are copied. A row is a pixel of an image.
        weight: (tasks or 1, channels).
        bias: (tasks or 1, channels).
        eps: added to the variance.
        relu: whether negative values become zero.
        backend: "auto" (native where its kernels are loaded, else reference), "native" (compiled) or "reference" (plain
            torch); under torch.func transforms and in forward mode as `kfo_ext.transform`.

    Returns:
        y: (tasks, rows, channels), of x's dtype. Half types, and everything under autocast, compute in float32.

    Raises:
        ValueError: sizes or devices that do not fit, fewer than 2 rows, an eps that is not positive, or an unknown
            backend.
        TypeError: operands that are no dense floating-point tensors or, outside autocast, of several dtypes.
        RuntimeError: the backend asked for does not run here.

    Source: Ioffe and Szegedy 2015, algorithm 1, with the batch's statistics always (paper, section 5).
    """
    given = (x, weight, bias)
    usual = OPERATOR.check(given)
    _check(x, weight, bias, eps, relu)

    def compute(family: BatchNormFamily | None, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if family is None:
            return reference.batch_norm_relu(x, weight, bias, eps, relu)
        return family.forward(x, weight, bias, eps, relu)[0]

    return OPERATOR.run(compute, given, backend, usual)
