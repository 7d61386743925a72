"""torch's convolution and batch norm of one task, which under torch.func.vmap compute all tasks with our operators.

Activations keep torch's order of dimensions, (images, channels, height, width), and lie in memory channels last: a
layer reads what the one before has written, without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.functional import batch_norm_relu
from kfo_ext.functional import conv2d as tasks_conv2d


class _UnderVmap(torch.autograd.Function):
    """A function whose vmap rule is all there is of it; ordinary autograd differentiates what the rule computes."""

    @staticmethod
    def forward(*operands):
        raise RuntimeError("expected an input that torch.func.vmap maps over")

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class _Conv2d(_UnderVmap):
    @staticmethod
    def vmap(info, in_dims, x, weight, stride, padding, channels_last):
        x, weight = (_tasks(X, dim, info.batch_size) for X, dim in zip((x, weight), in_dims))
        x = x.permute(0, 1, 3, 4, 2).contiguous()
        y = tasks_conv2d(x, weight, stride=stride, padding=padding, channels_last=channels_last)
        return y.permute(0, 1, 4, 2, 3), 0


class _BatchNorm(_UnderVmap):
    @staticmethod
    def vmap(info, in_dims, x, weight, bias, eps, relu, running, left_out):
        x, weight, bias = (_tasks(X, dim, info.batch_size) for X, dim in zip((x, weight, bias), in_dims))
        pixels = x.movedim(2, -1)
        rows = pixels.reshape(len(x), -1, x.shape[2])
        if running is not None:
            shift = 0 if left_out is None else _tasks(left_out, in_dims[-1], info.batch_size)
            running.statistics.note(running, rows, shift)
        y = batch_norm_relu(rows, weight, bias, eps=eps, relu=relu)
        return y.view(pixels.shape).movedim(-1, 2), 0


class Statistics:
    """What running statistics are to follow once a forward is done: each task's own, of every call."""

    def __init__(self) -> None:
        # By the identity of a running mean.
        self._calls: dict[int, list[tuple[Running, Tensor, Tensor]]] = {}

    @torch.no_grad()
    def note(self, running: Running, rows: Tensor, shift: Tensor | float) -> None:
        """One call of all tasks: rows (tasks, n, channels), and what each of them lacks."""
        variances, means = torch.var_mean(rows, 1)
        self._calls.setdefault(id(running.mean), []).append((running, means + shift, variances))

    @torch.no_grad()
    def follow(self) -> None:
        """Takes them in, task by task, as so many calls of torch's batch norm would."""
        for calls in self._calls.values():
            runnings, means, variances = zip(*calls)
            running = runnings[0]
            for statistic, values in ((running.mean, means), (running.variance, variances)):
                rows = torch.stack(values, 1).flatten(0, 1)
                kept = 1 - running.momentum
                ages = torch.arange(len(rows) - 1, -1, -1, dtype=rows.dtype, device=rows.device)
                # By `data`: a graph may hold them, and torch's own batch norm leaves their version as it is.
                statistic.data.mul_(kept ** len(rows)).add_((running.momentum * kept**ages) @ rows)


class Running(NamedTuple):
    """The running statistics of a batch norm, (channels,) each, how fast they follow, and where that is noted."""

    statistics: Statistics
    mean: Tensor
    variance: Tensor
    momentum: float


def _tasks(X: Tensor, dim: int | None, tasks: int) -> Tensor:
    return X.expand(tasks, *X.shape) if dim is None else X.movedim(dim, 0)


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, channels_last: bool = False) -> Tensor:
    """The cross-correlation of a task's images; x is mapped over.

    Args:
        x: (images, in_channels, height, width).
        weight: (out_channels, in_channels, kernel_height, kernel_width).
        stride: of both axes.
        padding: zeros on each side of both axes.
        channels_last: see `kfo_ext.functional.conv2d`.

    Returns:
        y: (images, out_channels, out_height, out_width).
    """
    return _Conv2d.apply(x, weight, stride, padding, channels_last)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    running: Running | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Batch norm by the statistics of a task's own batch, then ReLU if `relu`; x is mapped over.

    Args:
        x: (n, channels, ...).
        weight: (channels,).
        bias: (channels,).
        eps: added to the variance.
        relu: whether negative values become zero.
        running: the statistics to bring up to date.
        left_out: (channels,), what x lacks in every row: it changes the running mean alone.

    Returns:
        y: as x.
    """
    return _BatchNorm.apply(x, weight, bias, eps, relu, running, left_out)
