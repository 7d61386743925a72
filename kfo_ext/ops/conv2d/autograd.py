"""Fakes and derivatives of the convolution operators.

    conv2d          y (x, weight)
    conv2d_input    dx(dy, weight)    gradient of <conv2d(x, weight), dy> by x
    conv2d_weight   dw(x, dy)         ... by weight

The form <conv2d(x, weight), y> is linear in each of x, weight and y, and each operator is its gradient by one of them:
the derivatives of each are the other two, to any order. There are two such families: the compiled one, and that of
`kfo_ext.ops.conv2d.grouped`, named grouped_conv2d and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.ops import library
from kfo_ext.ops.conv2d import grouped
from kfo_ext.ops.conv2d.vmap import rules
from kfo_ext.ops.registration import below_autograd, register_operator


def _as_it_is(X: Tensor, like: Tensor) -> Tensor:
    return X


class ConvFamily(NamedTuple):
    """The overloads of the three gradients of the form.

    Attributes:
        conv2d: gradient by y.
        input: gradient by x.
        weight: gradient by weight.
        laid_out: maps (images, other images) to the first ones in the memory layout that a call with the others reads
            without a copy. A cotangent is an operand of two calls, and is copied once.
    """

    conv2d: torch._ops.OpOverload
    input: torch._ops.OpOverload
    weight: torch._ops.OpOverload
    laid_out: Callable[[Tensor, Tensor], Tensor] = _as_it_is


def _functions(family: ConvFamily) -> tuple[type[Function], type[Function], type[Function]]:
    # `fixed` is (stride, padding); `below` the keyset to redispatch with.
    class Conv2d(Function):
        @staticmethod
        def forward(ctx, x, weight, stride, padding, below):
            ctx.save_for_backward(x, weight)
            ctx.fixed = stride, padding
            return below_autograd(family.conv2d, below, x, weight, stride, padding)

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            dy = family.laid_out(dy, x)
            need_x, need_weight = ctx.needs_input_grad[:2]
            dx = family.input(dy, weight, list(x.shape[2:4]), *ctx.fixed) if need_x else None
            dweight = family.weight(x, dy, list(weight.shape[3:]), *ctx.fixed) if need_weight else None
            return dx, dweight, None, None, None

    class Conv2dInput(Function):
        @staticmethod
        def forward(ctx, dy, weight, size, stride, padding, below):
            ctx.save_for_backward(dy, weight)
            ctx.fixed = stride, padding
            return below_autograd(family.input, below, dy, weight, size, stride, padding)

        @staticmethod
        def backward(ctx, ddx):
            dy, weight = ctx.saved_tensors
            ddx = family.laid_out(ddx, dy)
            need_dy, need_weight = ctx.needs_input_grad[:2]
            ddy = family.conv2d(ddx, weight, *ctx.fixed) if need_dy else None
            dweight = family.weight(ddx, dy, list(weight.shape[3:]), *ctx.fixed) if need_weight else None
            return ddy, dweight, None, None, None, None

    class Conv2dWeight(Function):
        @staticmethod
        def forward(ctx, x, dy, kernel_size, stride, padding, below):
            ctx.save_for_backward(x, dy)
            ctx.fixed = stride, padding
            return below_autograd(family.weight, below, x, dy, kernel_size, stride, padding)

        @staticmethod
        def backward(ctx, ddweight):
            x, dy = ctx.saved_tensors
            need_x, need_dy = ctx.needs_input_grad[:2]
            dx = family.input(dy, ddweight, list(x.shape[2:4]), *ctx.fixed) if need_x else None
            ddy = family.conv2d(x, ddweight, *ctx.fixed) if need_dy else None
            return dx, ddy, None, None, None, None

    return Conv2d, Conv2dInput, Conv2dWeight


def _fakes() -> tuple[Callable, Callable, Callable]:
    def conv2d(x, weight, stride, padding):
        sizes = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:4], weight.shape[3:])]
        return x.new_empty((*x.shape[:2], *sizes, weight.shape[1]))

    def conv2d_input(dy, weight, size, stride, padding):
        return dy.new_empty((*dy.shape[:2], *size, weight.shape[2]))

    def conv2d_weight(x, dy, kernel_size, stride, padding):
        return x.new_empty((x.shape[0], dy.shape[4], x.shape[4], *kernel_size))

    return conv2d, conv2d_input, conv2d_weight


def _overloads(prefix: str) -> Sequence[torch._ops.OpOverload]:
    return [getattr(torch.ops.kfo_ext, f"{prefix}conv2d{suffix}").default for suffix in ("", "_input", "_weight")]


def _register(fragment: torch.library.Library, family: ConvFamily, fakes: Sequence[Callable]) -> ConvFamily:
    for overload, function, fake, rule in zip(family[:3], _functions(family), fakes, rules(family), strict=True):
        register_operator(fragment, overload, function, fake, rule, "kfo_ext.functional.conv2d")
    return family


def _register_native(fragment: torch.library.Library) -> ConvFamily:
    conv2d, input, weight = _overloads("")
    return _register(fragment, ConvFamily(conv2d, input, weight), _fakes())


def _register_grouped(fragment: torch.library.Library) -> ConvFamily:
    kernels = []
    for (schema, kernel), empty in zip(grouped.OPERATORS.items(), _fakes(), strict=True):
        kernels.append(grouped.with_no_tasks(kernel, empty))
        fragment.impl(fragment.define(schema), grouped.of_its_own(kernels[-1]), "CompositeExplicitAutograd")
    conv2d, input, weight = _overloads("grouped_")
    # Run without data, the kernels give strides too: those that torch's convolution chooses.
    return _register(fragment, ConvFamily(conv2d, input, weight, grouped.laid_out), kernels)


# The compiled operators; None where the CPU library is not there.
CONV = library.once("conv", _register_native) if library.loaded("cpu") else None
GROUPED: ConvFamily = library.once("grouped_conv", _register_grouped)
