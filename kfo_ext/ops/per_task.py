"""torch's convolution and batch norm of one task, which under torch.func.vmap compute all tasks with our operators.

Activations keep torch's order of dimensions, (images, channels, height, width), in channels-last memory: a layer reads
the previous layer's output without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfo_ext.ops.batch_norm.op import batch_norm_relu
from kfo_ext.ops.conv2d.op import conv2d as tasks_conv2d
from kfo_ext.ops.torch_private import (
    VMAP,
    add_batch_dim,
    innermost_level,
    resume_innermost,
    suspend_innermost,
    unwrap_batched,
    vmap_level,
)


def _all_tasks(function: Callable, *operands: Any) -> Tensor:
    """Apply a function to all tasks' operands under the innermost vmap, which maps over tasks.

    Args:
        function: takes the number of tasks, and for each operand the pair of the tensor and its task dimension or None.
        *operands: the operands, as vmap passes them.

    Returns:
        The result, mapped over tasks.

    Raises:
        RuntimeError: the innermost transform is not vmap.
    """
    # As torch applies the vmap rule of an autograd.Function, without making a Function for each call.
    innermost = innermost_level()
    if innermost is None or innermost.key() != VMAP:
        raise RuntimeError("per_task: expected to be called under torch.func.vmap, innermost")
    mapping = vmap_level(innermost)
    level, tasks = mapping.level(), mapping.batchSize()
    pairs = [unwrap_batched(X, level) if isinstance(X, Tensor) else (X, None) for X in operands]
    suspended = suspend_innermost()
    try:
        y = function(tasks, *pairs)
    finally:
        resume_innermost(suspended)
    return add_batch_dim(y, 0, level)


class Statistics:
    """The statistics of all tasks and calls of a forward, to update running statistics with after it."""

    def __init__(self) -> None:
        # By the id of a running mean or variance: layers may share one of them, or both.
        self._calls: dict[int, list[tuple[Tensor, float, Tensor]]] = {}

    @torch.no_grad()
    def note(self, running: Running, rows: Tensor, shift: Tensor | float) -> None:
        """Record one call of all tasks: rows (tasks, n, channels), and the bias that they lack."""
        variances, means = torch.var_mean(rows, 1)
        for statistic, values in ((running.mean, means + shift), (running.variance, variances)):
            self._calls.setdefault(id(statistic), []).append((statistic, running.momentum, values))

    @torch.no_grad()
    def follow(self) -> None:
        """Update running statistics task by task, as the same number of calls of torch's batch norm would."""
        for calls in self._calls.values():
            statistic, _, first = calls[0]
            ages = torch.arange(len(first) - 1, -1, -1, dtype=first.dtype, device=first.device)
            # What the calls of a task leave of the value before them.
            kept = math.prod(1 - momentum for _, momentum, _ in calls)
            weights, later = kept**ages, 1.0
            # Through `data`: a graph may hold them, and torch's own batch norm does not change their version.
            statistic.data.mul_(kept ** len(first))
            for _, momentum, values in reversed(calls):
                statistic.data.add_((momentum * later * weights) @ values)
                later *= 1 - momentum


class Running(NamedTuple):
    """The running statistics of a batch norm.

    Attributes:
        statistics: the record of calls.
        mean: (channels,).
        variance: (channels,).
        momentum: as for torch's batch norm.
    """

    statistics: Statistics
    mean: Tensor
    variance: Tensor
    momentum: float


def _tasks(pair: tuple[Tensor, int | None], tasks: int) -> Tensor:
    X, dim = pair
    if dim is None:
        return X.expand(tasks, *X.shape)
    # An identity view would add a node to every derivative.
    return X if dim == 0 else X.movedim(dim, 0)


def _channels_last(pair: tuple[Tensor, int | None], tasks: int) -> Tensor:
    """(tasks, n, channels, ...) as (tasks, n, ..., channels): the layer's own output, if a layer here made it."""
    X, dim = pair
    own, version = getattr(X, _OWN, (None, 0)) if dim == 0 else (None, 0)
    # After a change of X in place, a checkpointed backward pass fails if it reads the layer's output itself.
    return _tasks(pair, tasks).movedim(2, -1) if own is None or X._version != version else own


def _channels_first(Y: Tensor) -> Tensor:
    """(tasks, n, ..., channels) as (tasks, n, channels, ...), in the same memory."""
    X = Y.movedim(-1, 2)
    if not X.is_inference():
        # For `_channels_last`: moving the dimension back would add a node to every derivative.
        setattr(X, _OWN, (Y, X._version))
    return X


_OWN = "_kfo_channels_last"


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, channels_last: bool = False) -> Tensor:
    """Return the cross-correlation of a task's images, under vmap over x.

    Args:
        x: (images, in_channels, height, width).
        weight: (out_channels, in_channels, kernel_height, kernel_width).
        stride: stride of both axes.
        padding: zeros on each side of both axes.
        channels_last: see `kfo_ext.functional.conv2d`.

    Returns:
        y: (images, out_channels, out_height, out_width).
    """

    def compute(tasks: int, x: Any, weight: Any) -> Tensor:
        images = _channels_last(x, tasks).contiguous()
        y = tasks_conv2d(images, _tasks(weight, tasks), stride=stride, padding=padding, channels_last=channels_last)
        return _channels_first(y)

    return _all_tasks(compute, x, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a linear layer of a task's rows, under vmap over all operands: one product with the bias added to it.

    Args:
        x: (n, in_features).
        weight: (out_features, in_features).
        bias: (out_features,).

    Returns:
        y: (n, out_features).
    """

    def compute(tasks: int, x: Any, weight: Any, bias: Any) -> Tensor:
        return torch.baddbmm(_tasks(bias, tasks).unsqueeze(1), _tasks(x, tasks), _tasks(weight, tasks).mT)

    return _all_tasks(compute, x, weight, bias)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    running: Running | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Return the batch norm by the statistics of a task's batch, then ReLU if `relu`, under vmap over x.

    Args:
        x: (n, channels, ...).
        weight: (channels,).
        bias: (channels,).
        eps: added to the variance.
        relu: whether to apply ReLU.
        running: the running statistics to update.
        left_out: (channels,), a bias that x lacks in every row: it changes only the running mean; its gradient is zero.

    Returns:
        y: the shape of x.
    """

    def compute(tasks: int, x: Any, weight: Any, bias: Any, left_out: Any) -> Tensor:
        pixels = _channels_last(x, tasks)
        rows = pixels.reshape(tasks, -1, pixels.shape[-1])
        shift = None if left_out[0] is None else _tasks(left_out, tasks)
        if running is not None:
            running.statistics.note(running, rows, 0 if shift is None else shift)
        bias = _tasks(bias, tasks)
        if shift is not None:
            bias = torch.add(bias, shift, alpha=0)
        y = batch_norm_relu(rows, _tasks(weight, tasks), bias, eps=eps, relu=relu)
        return _channels_first(y.view(pixels.shape))

    return _all_tasks(compute, x, weight, bias, left_out)
