"""torch's convolution and batch norm of one task outside torch.func, on our operators.

Images keep torch's order of dimensions, (images, channels, height, width), and lie in memory channels last. They are no
views: what changes them in place costs and means what it does for torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.ops.batch_norm.autograd import BATCH_NORM
from kfo_ext.ops.conv2d.autograd import CONV

AVAILABLE = CONV is not None and BATCH_NORM is not None


def _pixels(X: Tensor) -> Tensor:
    """(n, c, h, w) -> (1, n, h, w, c), contiguous."""
    return X.permute(0, 2, 3, 1).contiguous().unsqueeze(0)


def _rows(X: Tensor) -> Tensor:
    """(n, c, h, w) -> (1, n h w, c), contiguous."""
    return X.permute(0, 2, 3, 1).reshape(1, -1, X.shape[1])


def _own(Y: Tensor, images: int, channels: int, height: int, width: int) -> Tensor:
    """The tensor itself as (n, c, h, w), channels last: in place, where a permutation would be a view."""
    shape = images, channels, height, width
    return Y.as_strided_(shape, (height * width * channels, 1, width * channels, channels))


def _as(X: Tensor, pixels: Tensor) -> Tensor:
    """(n, h, w, c) -> (n, c, h, w), in X's memory format: a gradient that torch could give."""
    images = pixels.permute(0, 3, 1, 2)
    return images.contiguous() if X.is_contiguous() else images


class _Conv2d(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.set_materialize_grads(False)
        y = CONV.conv2d(_pixels(x), weight.unsqueeze(0), stride, padding)
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, weight)
        ctx.fixed = stride, padding
        _, images, height, width, channels = y.shape
        return _own(y, images, channels, height, width)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dy, dx, dweight = _pixels(dy), None, None
        if need_x:
            dx = _as(x, CONV.input(dy, weight.unsqueeze(0), list(x.shape[2:]), *ctx.fixed).squeeze(0))
        if need_weight:
            dweight = CONV.weight(_pixels(x), dy, list(weight.shape[2:]), *ctx.fixed).squeeze(0)
        return dx, dweight, dy.flatten(0, 3).sum(0) if need_bias else None, None, None


def _norm_gradients(saved: Sequence[Tensor], dy: Tensor, relu: bool, needed: Sequence[bool]) -> list[Tensor | None]:
    """Those by x, weight and bias; saved: x, weight, bias, mean, rstd."""
    x, weight, bias, mean, rstd = saved
    need = list(needed)
    assert BATCH_NORM is not None
    dx, dweight, dbias = BATCH_NORM.backward(
        _rows(x), weight.unsqueeze(0), bias.unsqueeze(0), mean, rstd, _rows(dy), relu, need
    )
    images, channels, height, width = x.shape
    if need[0]:
        dx = _as(x, dx.view(images, height, width, channels))
    return [dx if need[0] else None, dweight[0] if need[1] else None, dbias[0] if need[2] else None]


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.set_materialize_grads(False)
        z, mean, rstd = BATCH_NORM.forward(_rows(x), weight.unsqueeze(0), bias.unsqueeze(0), eps, False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return _own(z, *x.shape)

    @staticmethod
    def backward(ctx, dz):
        if dz is None:
            return (None,) * 4
        return *_norm_gradients(ctx.saved_tensors, dz, False, ctx.needs_input_grad[:3]), None


class _NormRelu(Function):
    """relu(z) of a z that `_BatchNorm` made: its derivatives are by x, weight and bias, past z, or by z alone."""

    @staticmethod
    def forward(ctx, z, x, weight, bias, mean, rstd, eps, in_place, unseen):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.unseen = eps, unseen
        if in_place:
            ctx.mark_dirty(z)
            return z.relu_()
        return z.relu()

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        if ctx.unseen():
            return None, *_norm_gradients(saved, dy, True, ctx.needs_input_grad[1:4]), *(None,) * 5
        # Somebody may differentiate by z, or hook into it. z itself is not kept, as torch keeps none.
        with torch.no_grad():
            x, weight, bias, _, _ = saved
            z = BATCH_NORM.forward(_rows(x), weight.unsqueeze(0), bias.unsqueeze(0), ctx.eps, False)[0]
            z = _own(z, *x.shape)
        return torch.ops.aten.threshold_backward(dy, z, 0), *(None,) * 8


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """The cross-correlation of images, differentiable to any order.

    Args:
        x: (images, in_channels, height, width).
        weight: (out_channels, in_channels, kernel_height, kernel_width).
        bias: (out_channels,).
        stride: of both axes.
        padding: zeros on each side of both axes.

    Returns:
        y: (images, out_channels, out_height, out_width).
    """
    return _Conv2d.apply(x, weight, bias, stride, padding)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm by the statistics of the batch, differentiable to any order.

    Args:
        x: (images, channels, height, width).
        weight: (channels,); None for ones.
        bias: (channels,); None for zeros.
        eps: added to the variance.

    Returns:
        z: as x.
    """
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    # A copy: torch keeps no bias for its derivatives, so it may change before they are asked for.
    bias = x.new_zeros(x.shape[1]) if bias is None else bias.clone()
    return _BatchNorm.apply(x, weight, bias, eps)


@torch.no_grad()
def follow(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Brings running statistics up to date, as torch's batch norm of x does."""
    # In this format torch's kernel is ten times as fast.
    torch.batch_norm_update_stats(
        x.detach().contiguous(memory_format=torch.channels_last), running_mean, running_var, momentum
    )


def norm_relu(z: Tensor, in_place: bool, unseen: Callable[[], bool]) -> Tensor | None:
    """relu(z), whose derivatives go past z at once; None if z is not what `batch_norm` made.

    Args:
        z: (images, channels, height, width), with the values that it was made with.
        in_place: whether z becomes the result; its values before are then out of reach.
        unseen: asked in each backward pass, whether nothing else can ask for, or hook into, the derivative by z.
    """
    node: Any = z.grad_fn
    if getattr(type(node), "_forward_cls", None) is not _BatchNorm:
        return None
    try:
        saved = node.saved_tensors
    except RuntimeError:
        # Freed, or changed since: the backward pass says so, as torch's does.
        return None
    return _NormRelu.apply(z, *saved, node.eps, in_place, unseen)
