"""Fakes and derivatives of the batch norm operators.

The first two orders are operators; from the third on, derivatives are those of the plain reference: recomputed, slow,
right. mean and rstd travel from the forward to the others to spare them a pass over x. They are functions of x, and the
derivative by x holds what goes through them: as operands of their own they have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, vjp

from kfo_ext.ops import library
from kfo_ext.ops.batch_norm import reference
from kfo_ext.ops.batch_norm.vmap import rules
from kfo_ext.ops.registration import below_autograd, mark_not_needed, pick, register_operator


class BatchNormFamily(NamedTuple):
    """The overloads of the three orders."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    double_backward: torch._ops.OpOverload


def _refuse_derivatives_of_statistics(needed: tuple[bool, bool]) -> None:
    if any(needed):
        raise NotImplementedError(
            "mean, rstd: expected tensors without requires_grad, as batch_norm_relu returns them: "
            "the derivative by x holds theirs"
        )


def _functions(family: BatchNormFamily) -> tuple[type[Function], type[Function], type[Function]]:
    class BatchNormRelu(Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps, relu, below):
            ctx.set_materialize_grads(False)
            y, mean, rstd = below_autograd(family.forward, below, x, weight, bias, eps, relu)
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            ctx.mark_non_differentiable(mean, rstd)
            ctx.relu = relu
            return y, mean, rstd

        @staticmethod
        def backward(ctx, dy, _dmean, _drstd):
            if dy is None:
                return (None,) * 6
            need = list(ctx.needs_input_grad[:3])
            gradients = family.backward(*ctx.saved_tensors, dy, ctx.relu, need)
            return *map(pick, need, gradients), None, None, None

    class BatchNormReluBackward(Function):
        @staticmethod
        def forward(ctx, x, weight, bias, mean, rstd, dy, relu, need, below):
            _refuse_derivatives_of_statistics(ctx.needs_input_grad[3:5])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, weight, bias, mean, rstd, dy)
            ctx.relu = relu
            outputs = below_autograd(family.backward, below, x, weight, bias, mean, rstd, dy, relu, need)
            mark_not_needed(ctx, outputs, need)
            return outputs

        @staticmethod
        def backward(ctx, ddx, ddweight, ddbias):
            if ddx is None and ddweight is None and ddbias is None:
                return (None,) * 9
            x, weight, bias, mean, rstd, dy = ctx.saved_tensors
            need_x, need_weight, need_bias, _, _, need_dy, _, _, _ = ctx.needs_input_grad
            need = [need_x, need_weight, need_dy]
            dx = dweight = ddy = None
            if any(need):
                dx, dweight, ddy = family.double_backward(
                    x, weight, bias, mean, rstd, dy, ddx, ddweight, ddbias, ctx.relu, need
                )
            # The bias moves where the ReLU cuts, and nothing else: a derivative of zero almost everywhere.
            dbias = torch.zeros_like(bias) if need_bias else None
            return pick(need_x, dx), pick(need_weight, dweight), dbias, None, None, pick(need_dy, ddy), None, None, None

    class BatchNormReluDoubleBackward(Function):
        @staticmethod
        def forward(ctx, x, weight, bias, mean, rstd, dy, ddx, ddweight, ddbias, relu, need, below):
            _refuse_derivatives_of_statistics(ctx.needs_input_grad[3:5])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, weight, bias, rstd, dy, ddx, ddweight, ddbias)
            ctx.relu = relu
            outputs = below_autograd(
                family.double_backward, below, x, weight, bias, mean, rstd, dy, ddx, ddweight, ddbias, relu, need
            )
            mark_not_needed(ctx, outputs, need)
            return outputs

        @staticmethod
        def backward(ctx, ex, eweight, ey):
            if ex is None and eweight is None and ey is None:
                return (None,) * 12
            x, weight, bias, rstd, dy, *dd = ctx.saved_tensors
            needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:9]]
            gradients = _third_order((x, weight, bias, dy), tuple(dd), rstd, ctx.relu, (ex, eweight, ey), needed)
            return *gradients[:3], None, None, *gradients[3:], None, None, None

    return BatchNormRelu, BatchNormReluBackward, BatchNormReluDoubleBackward


def _paired(cotangents: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> Tensor:
    """Sum of <cotangent, output> over the pairs that are complete; at least one is."""
    terms = [(c * out).sum() for c, out in zip(cotangents, outputs) if c is not None and out is not None]
    return reduce(torch.add, terms)


def _third_order(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    dd: tuple[Tensor | None, ...],
    rstd: Tensor,
    relu: bool,
    cotangents: tuple[Tensor | None, ...],
    needed: list[bool],
) -> list[Tensor | None]:
    """The derivatives of the double backward in plain torch; differentiable where grad mode is on.

    Args:
        operands: x, weight, bias and dy.
        dd: ddx, ddweight and ddbias.
        rstd: (tasks, channels), which the forward returned.
        relu: whether the forward ended with a ReLU.
        cotangents: those of dx, dweight and ddy; at least one is a tensor.
        needed: whether the derivative by each of `operands` and `dd` is needed.

    Returns:
        The derivatives by `operands` and `dd`, None where not needed.
    """
    # The eps that rstd was made with: rstd and all its derivatives by x then come out as they were.
    eps = rstd.square().reciprocal().unsqueeze(1) - operands[0].detach().var(1, unbiased=False, keepdim=True)

    # By torch.func: under its transforms, torch.autograd.grad could not be given operands of its own.
    def first(x: Tensor, weight: Tensor, dy: Tensor, bias: Tensor, dd: tuple[Tensor | None, ...]) -> Tensor:
        pull = vjp(partial(reference.batch_norm_relu, eps=eps, relu=relu), x, weight, bias)[1]
        return _paired(dd, pull(dy))

    def second(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, *dd: Tensor | None) -> Tensor:
        return _paired(cotangents, grad(first, argnums=(0, 1, 2))(x, weight, dy, bias, dd))

    wanted = tuple(i for i, (X, need) in enumerate(zip((*operands, *dd), needed)) if need and X is not None)
    gradients = iter(grad(second, argnums=wanted)(*operands, *dd))
    return [next(gradients) if need else None for need in needed]


def _fakes() -> tuple[Callable, Callable, Callable]:
    def empty(like: Tensor, needed: bool) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    def forward(x, weight, bias, eps, relu):
        statistics = (x.shape[0], x.shape[2])
        return x.new_empty(x.shape), x.new_empty(statistics), x.new_empty(statistics)

    def backward(x, weight, bias, mean, rstd, dy, relu, need):
        return tuple(map(empty, (x, weight, bias), need))

    def double_backward(x, weight, bias, mean, rstd, dy, ddx, ddweight, ddbias, relu, need):
        return tuple(map(empty, (x, weight, x), need))

    return forward, backward, double_backward


def _register(fragment: torch.library.Library) -> BatchNormFamily:
    names = ("batch_norm_relu", "batch_norm_relu_backward", "batch_norm_relu_double_backward")
    family = BatchNormFamily(*(getattr(torch.ops.kfo_ext, name).default for name in names))
    for overload, function, fake, rule in zip(family, _functions(family), _fakes(), rules(family)):
        register_operator(fragment, overload, function, fake, rule, "kfo_ext.functional.batch_norm_relu")
    return family


# The compiled operators; None where the CPU library, which holds their schemas, is not there.
BATCH_NORM = library.once("batch_norm", _register) if library.loaded("cpu") else None
