"""torch's convolution and batch norm of one task outside torch.func, on our operators.

Images keep torch's order of dimensions, (images, channels, height, width), in channels-last memory. They are no views,
so in-place changes have the cost and meaning that they have for torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.ops.batch_norm.autograd import BATCH_NORM, BatchNormFamily
from kfo_ext.ops.conv2d.autograd import CONV, ConvFamily
from kfo_ext.ops.registration import apply_of, check_memory
from kfo_ext.ops.torch_private import below_autograd_and_views, dispatch_keys, dispatch_modes, transformed

AVAILABLE = CONV is not None and BATCH_NORM is not None
# None where nothing is AVAILABLE, and no function is called.
_CONV, _NORM = cast("ConvFamily", CONV), cast("BatchNormFamily", BATCH_NORM)
# The dispatch keys of an ordinary CPU tensor.
_PLAIN = dispatch_keys(torch.empty(0, device="cpu"))
Gradients = Sequence[Tensor | None]


def _direct(*operands: Tensor | None) -> bool:
    """Whether a backward pass may call the kernels themselves; the operators have rules for transforms and modes."""
    if transformed() or dispatch_modes() or torch.compiler.is_compiling():
        return False
    # The vmap of torch.autograd.grad(is_grads_batched=True) is not torch.func's; its tensors have a key of their own.
    return all(X is None or dispatch_keys(X) == _PLAIN for X in operands)


class _Operators:
    """Calls operators, and converts their operands and results, in differentiable operations."""

    @staticmethod
    def call(overload: torch._ops.OpOverload, *arguments: Any) -> Any:
        """The operator's result."""
        return overload(*arguments)

    @staticmethod
    def pixels(X: Tensor) -> Tensor:
        """(n, c, h, w) -> (1, n, h, w, c), contiguous."""
        return X.permute(0, 2, 3, 1).contiguous().unsqueeze(0)

    @staticmethod
    def rows(X: Tensor) -> Tensor:
        """(n, c, h, w) -> (1, n h w, c), contiguous."""
        return X.permute(0, 2, 3, 1).reshape(1, -1, X.shape[1])

    @staticmethod
    def images(Y: Tensor, images: int, channels: int, height: int, width: int) -> Tensor:
        """The pixels or rows Y as (n, c, h, w), channels last."""
        return Y.view(images, height, width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def only(Y: Tensor) -> Tensor:
        """(1, ...) -> (...)."""
        return Y.squeeze(0)

    @staticmethod
    def plus(Y: Tensor, other: Tensor) -> Tensor:
        """The sum of a new tensor Y and another."""
        return Y + other


class _Kernels(_Operators):
    """The same in few operations, without derivatives; results are no views, so autograd adds to them in place."""

    @staticmethod
    def call(overload: torch._ops.OpOverload, *arguments: Any) -> Any:
        """The operator's result, from its kernel at once."""
        try:
            with below_autograd_and_views():
                return overload(*arguments)
        except RuntimeError as error:
            check_memory(overload, arguments[0], error)
            raise

    @staticmethod
    def pixels(X: Tensor) -> Tensor:
        """(n, c, h, w) -> (1, n, h, w, c), contiguous."""
        n, c, h, w = X.shape
        if not X.is_contiguous(memory_format=torch.channels_last):
            return _Operators.pixels(X)
        return X.as_strided((1, n, h, w, c), (n * h * w * c, h * w * c, w * c, c, 1))

    @staticmethod
    def rows(X: Tensor) -> Tensor:
        """(n, c, h, w) -> (1, n h w, c), contiguous."""
        n, c, h, w = X.shape
        if not X.is_contiguous(memory_format=torch.channels_last):
            return _Operators.rows(X)
        return X.as_strided((1, n * h * w, c), (n * h * w * c, c, 1))

    @staticmethod
    def images(Y: Tensor, images: int, channels: int, height: int, width: int) -> Tensor:
        """The tensor Y itself as (n, c, h, w), channels last: changed in place."""
        shape = images, channels, height, width
        return Y.as_strided_(shape, (height * width * channels, 1, width * channels, channels))

    @staticmethod
    def only(Y: Tensor) -> Tensor:
        """(1, ...) -> (...), in place."""
        return Y.squeeze_(0)

    @staticmethod
    def plus(Y: Tensor, other: Tensor) -> Tensor:
        """The sum of a new tensor Y and another, in Y."""
        return Y.add_(other)


def _way(*cotangents: Tensor | None) -> type[_Operators]:
    """How to compute a derivative that has no Function of its own."""
    return _Kernels if _direct(*cotangents) and not torch.is_grad_enabled() else _Operators


def _as(X: Tensor, Y: Tensor, by: type[_Operators]) -> Tensor:
    """The pixels or rows Y as (n, c, h, w) in X's memory format, as for torch's own gradient."""
    Y = by.images(Y, *X.shape)
    return Y.contiguous() if X.is_contiguous() else Y


def _conv2d_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, by: type[_Operators]
) -> Tensor:
    y = by.call(_CONV.conv2d, by.pixels(x), weight.unsqueeze(0), stride, padding)
    if bias is not None:
        y = by.plus(y, bias)
    _, images, height, width, channels = y.shape
    return by.images(y, images, channels, height, width)


def _conv2d_gradients_of(
    dy: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], stride: int, padding: int, by: type[_Operators]
) -> Gradients:
    """The gradients by x, weight and bias, None where not needed."""
    dy, dx, dweight = by.pixels(dy), None, None
    if needed[0]:
        dx = by.call(_CONV.input, dy, weight.unsqueeze(0), list(x.shape[2:]), stride, padding)
        dx = _as(x, dx, by)
    if needed[1]:
        dweight = by.only(by.call(_CONV.weight, by.pixels(x), dy, list(weight.shape[2:]), stride, padding))
    return dx, dweight, dy.sum((0, 1, 2, 3)) if needed[2] else None


def _conv2d_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], stride: int, padding: int
) -> Gradients:
    """The gradients by x, weight and bias, None where not needed; differentiable where grad mode is on."""
    if not _direct(dy, x, weight):
        return _conv2d_gradients_of(dy, x, weight, needed, stride, padding, _Operators)
    dy = dy.contiguous(memory_format=torch.channels_last)
    if not torch.is_grad_enabled():
        return _conv2d_gradients_of(dy, x, weight, needed, stride, padding, _Kernels)
    return apply_of(_Conv2dGradients)(dy, x, weight, needed, stride, padding)


class _Conv2d(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.fixed = stride, padding
        return _conv2d_of(x, weight, bias, stride, padding, _Kernels)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 5
        return *_conv2d_gradients(dy, *ctx.saved_tensors, ctx.needs_input_grad[:3], *ctx.fixed), None, None


class _Conv2dGradients(Function):
    @staticmethod
    def forward(ctx, dy, x, weight, needed, stride, padding):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight)
        ctx.fixed = stride, padding
        return tuple(_conv2d_gradients_of(dy, x, weight, needed, stride, padding, _Kernels))

    @staticmethod
    def backward(ctx, ddx, ddweight, ddbias):
        dy, x, weight = ctx.saved_tensors
        need_dy, need_x, need_weight = ctx.needs_input_grad[:3]
        ddy = dx = dweight = None
        if need_dy:
            # The gradients are linear in dy: their derivative is the convolution of the other operands.
            pairs = [(a, b) for a, b in ((ddx, weight), (x, ddweight)) if a is not None and b is not None]
            by = _way(ddx, ddweight, ddbias)
            for image, kernel in pairs:
                bias = ddbias if ddy is None else None
                if _direct(image, kernel, bias):
                    y = apply_of(_Conv2d)(image, kernel, bias, *ctx.fixed)
                else:
                    y = _conv2d_of(image, kernel, bias, *ctx.fixed, _Operators)
                ddy = y if ddy is None else by.plus(ddy, y)
            if not pairs and ddbias is not None:
                ddy = ddbias[:, None, None].expand(dy.shape)
        if need_x and ddweight is not None:
            dx = _conv2d_gradients(dy, x, ddweight, (True, False, False), *ctx.fixed)[0]
        if need_weight and ddx is not None:
            dweight = _conv2d_gradients(dy, ddx, weight, (False, True, False), *ctx.fixed)[1]
        return ddy, dx, dweight, None, None, None


def _norm_of(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The batch norm of x, in its shape, with its mean and rstd."""
    z, mean, rstd = _Kernels.call(_NORM.forward, _Kernels.rows(x), weight.unsqueeze(0), bias.unsqueeze(0), eps, False)
    return _Kernels.images(z, *x.shape), mean, rstd


def _norm_gradients_of(
    saved: Sequence[Tensor], dy: Tensor, relu: bool, needed: Sequence[bool], by: type[_Operators]
) -> Gradients:
    """The gradients by x, weight and bias, None where not needed; saved: x, weight, bias, mean, rstd."""
    x, weight, bias, mean, rstd = saved
    dx, *rest = by.call(
        _NORM.backward,
        *(by.rows(x), weight.unsqueeze(0), bias.unsqueeze(0), mean, rstd, by.rows(dy), relu, list(needed)),
    )
    dweight, dbias = (by.only(gradient) if need else None for gradient, need in zip(rest, needed[1:]))
    return _as(x, dx, by) if needed[0] else None, dweight, dbias


def _norm_gradients(saved: Sequence[Tensor], dy: Tensor, relu: bool, needed: Sequence[bool]) -> Gradients:
    """The same, differentiable where grad mode is on."""
    if not _direct(dy):
        return _norm_gradients_of(saved, dy, relu, needed, _Operators)
    dy = dy.contiguous(memory_format=torch.channels_last)
    if not torch.is_grad_enabled():
        return _norm_gradients_of(saved, dy, relu, needed, _Kernels)
    return apply_of(_NormGradients)(*saved, dy, relu, needed)


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.set_materialize_grads(False)
        z, mean, rstd = _norm_of(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return z

    @staticmethod
    def backward(ctx, dz):
        if dz is None:
            return (None,) * 4
        return *_norm_gradients(ctx.saved_tensors, dz, False, ctx.needs_input_grad[:3]), None


class _NormGradients(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, rstd, dy, relu, needed):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd, dy)
        ctx.relu = relu
        return tuple(_norm_gradients_of((x, weight, bias, mean, rstd), dy, relu, needed, _Kernels))

    @staticmethod
    def backward(ctx, ddx, ddweight, ddbias):
        if ddx is None and ddweight is None and ddbias is None:
            return (None,) * 8
        x, weight, bias, mean, rstd, dy = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _, need_dy = ctx.needs_input_grad[:6]
        need = [need_x, need_weight, need_dy]
        dx = dweight = ddy = None
        if any(need):
            # The third order is that of the operator.
            by = _way(ddx, ddweight, ddbias)
            dx, dweight, ddy = by.call(
                _NORM.double_backward,
                *(by.rows(x), weight.unsqueeze(0), bias.unsqueeze(0), mean, rstd, by.rows(dy)),
                None if ddx is None else by.rows(ddx),
                *(None if dd is None else dd.unsqueeze(0) for dd in (ddweight, ddbias)),
                *(ctx.relu, need),
            )
            dx = _as(x, dx, by) if need_x else None
            dweight = by.only(dweight) if need_weight else None
            ddy = _as(dy, ddy, by) if need_dy else None
        # The bias moves where the ReLU cuts, and nothing else: a derivative of zero almost everywhere.
        dbias = torch.zeros_like(bias) if need_bias else None
        return dx, dweight, dbias, None, None, ddy, None, None


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
            z = _norm_of(x, weight, bias, ctx.eps)[0]
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
    return apply_of(_Conv2d)(x, weight, bias, stride, padding)


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
    return apply_of(_BatchNorm)(x, weight, bias, eps)


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
    return apply_of(_NormRelu)(z, *saved, node.eps, in_place, unseen)
