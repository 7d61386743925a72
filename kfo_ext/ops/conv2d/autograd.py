"""Fakes and derivatives of the convolution operators.

    conv2d          y (x, weight)
    conv2d_input    dx(dy, weight)    gradient of <conv2d(x, weight), dy> by x
    conv2d_weight   dw(x, dy)         ... by weight

The form <conv2d(x, weight), y> is linear in each of x, weight and y, and each operator is its gradient by one of them:
the derivatives of each are the other two, to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import Function

from kfo_ext.ops import library
from kfo_ext.ops.conv2d.vmap import rules
from kfo_ext.ops.registration import below_autograd, register_operator


class ConvFamily(NamedTuple):
    """The overloads of the three gradients of the form."""

    conv2d: torch._ops.OpOverload
    input: torch._ops.OpOverload
    weight: torch._ops.OpOverload


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


def _register(fragment: torch.library.Library) -> ConvFamily:
    family = ConvFamily(
        *(getattr(torch.ops.kfo_ext, f"conv2d{suffix}").default for suffix in ("", "_input", "_weight"))
    )
    for overload, function, fake, rule in zip(family, _functions(family), _fakes(), rules(family)):
        register_operator(fragment, overload, function, fake, rule, "kfo_ext.functional.conv2d")
    return family


# The compiled operators; None where the CPU library is not there.
CONV = library.once("conv", _register) if library.status()["cpu"][0] else None
