"""torch's convolution and batch norm of one task outside torch.func, on our operators.

Images keep torch's order of dimensions, (images, channels, height, width), in channels-last memory. They are no views,
so in-place changes have the cost and meaning that they have for torch's own.
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
    """The tensor itself as (n, c, h, w), channels last: changed in place, since a permutation would be a view."""
    shape = images, channels, height, width
    return Y.as_strided_(shape, (height * width * channels, 1, width * channels, channels))


def _as(X: Tensor, pixels: Tensor) -> Tensor:
    """(n, h, w, c) -> (n, c, h, w), in X's memory format, as for torch's own gradient."""
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
    """The gradients with respect to x, weight and bias; saved: x, weight, bias, mean, rstd."""
    x, weight, bias, mean, rstd = saved
    need = list(needed)
    assert BATCH_NORM is not None
    dx, dweight, dbias = BATCH_NORM.backward(
        _rows(x), weight.unsqueeze(0), bias.unsqueeze(0), mean, rstd, _rows(dy), relu, need
    )
    images, channels, height, width = x.shape
    if need[0]:
        dx = _as(x, dx.view(images, height, width, channels))
    return [dx if need[0] else None, dweight.squeeze(0) if need[1] else None, dbias.squeeze(0) if need[2] else None]


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
    """relu(z) of a z that `_BatchNorm` made, with derivatives with respect to x, weight and bias, or to z alone."""

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
        # z may be differentiated or have a hook. z itself is not saved, as torch saves none.
        with torch.no_grad():
            x, weight, bias, _, _ = saved
            z = BATCH_NORM.forward(_rows(x), weight.unsqueeze(0), bias.unsqueeze(0), ctx.eps, False)[0]
            z = _own(z, *x.shape)
        return torch.ops.aten.threshold_backward(dy, z, 0), *(None,) * 8


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Return the cross-correlation of images, differentiable to any order.

    Args:
        x: (images, in_channels, height, width).
        weight: (out_channels, in_channels, kernel_height, kernel_width).
        bias: (out_channels,).
        stride: stride of both axes.
        padding: zeros on each side of both axes.

    Returns:
        y: (images, out_channels, out_height, out_width).
    """
    return _Conv2d.apply(x, weight, bias, stride, padding)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return the batch norm by batch statistics, differentiable to any order.

    Args:
        x: (images, channels, height, width).
        weight: (channels,); None for ones.
        bias: (channels,); None for zeros.
        eps: added to the variance.

    Returns:
        z: the shape of x.
    """
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    # A copy: torch saves no bias for its derivatives, so it may change before the backward pass.
    bias = x.new_zeros(x.shape[1]) if bias is None else bias.clone()
    return _BatchNorm.apply(x, weight, bias, eps)


@torch.no_grad()
def follow(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Update running statistics as torch's batch norm of x does."""
    # torch's kernel is ten times as fast in this format.
    torch.batch_norm_update_stats(
        x.detach().contiguous(memory_format=torch.channels_last), running_mean, running_var, momentum
    )


def norm_relu(z: Tensor, in_place: bool, unseen: Callable[[], bool]) -> Tensor | None:
    """Return relu(z) with the fused derivative of batch norm + ReLU.

    Args:
        z: (images, channels, height, width), the unchanged result of `batch_norm`.
        in_place: whether to overwrite z with the result.
        unseen: called in each backward pass: whether nothing else can use, or hook into, the derivative by z.

    Returns:
        The result, or None if z was not made by `batch_norm` or its graph was freed.
    """
    node: Any = z.grad_fn
    if getattr(type(node), "_forward_cls", None) is not _BatchNorm:
        return None
    try:
        saved = node.saved_tensors
    except RuntimeError:
        # Freed or changed: the backward pass raises, as torch's does.
        return None
    return _NormRelu.apply(z, *saved, node.eps, in_place, unseen)
