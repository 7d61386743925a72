"""Fakes and derivatives of one family of the three operators.

Every derivative comes from one scalar form, F(R, G, L, Y) = sum <R^T G L, Y>, linear in each of its four slots:

    transform         Y = dF/dY
    transform_backward        (dR, dG, dL) = dF/d(R, G, L) at Y = dY
    transform_double_backward gradients by (R, G, L, dY) of F(ddR, G, L, dY) + F(R, ddG, L, dY) + F(R, G, ddL, dY)

and every higher order is a sum of such forms again (`form_gradients`), so the family is closed under differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.ops.registration import below_autograd, mark_not_needed, pick, register_operator
from kfo_ext.ops.transform.reference import sum_over_B
from kfo_ext.ops.transform.vmap import rules


class Family(NamedTuple):
    """The overloads of the three orders registered by one backend."""

    transform: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    double_backward: torch._ops.OpOverload


# One term of a sum of forms: the operands in the slots R, G, L, Y; a term with a missing operand is zero.
Term = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
SLOTS = 4


def form_gradients(
    family: Family, shapes: list[int], terms: Sequence[Term], wanted: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of sum_terms F(R, G, L, Y) by the wanted operands (compared by identity), or None for zero."""
    gradients: list[Tensor | None] = [None] * len(wanted)

    def add(slot_value: Tensor, gradient: Tensor) -> None:
        for i, operand in enumerate(wanted):
            if operand is slot_value:
                sum_so_far = gradients[i]
                gradients[i] = gradient if sum_so_far is None else sum_so_far + gradient
                return

    for R, G, L, Y in terms:
        if R is None or G is None or L is None or Y is None:
            continue
        need = [any(slot is operand for operand in wanted) for slot in (R, G, L)]
        if any(need):
            parts = family.backward(R, G, L, Y, shapes, need)
            for slot, part, needed in zip((R, G, L), parts, need):
                if needed:
                    add(slot, part)
        if any(Y is operand for operand in wanted):
            add(Y, family.transform(R, G, L, shapes))
    return gradients


def distinct(*operands: Tensor | None) -> list[Tensor | None]:
    """Aliases of the operands, so that `form_gradients` distinguishes a tensor in two slots."""
    return [None if operand is None else operand.view_as(operand) for operand in operands]


def _functions(family: Family) -> tuple[type[Function], type[Function], type[Function]]:
    class Transform(Function):
        @staticmethod
        def forward(ctx, R, G, L, shapes, bias, below):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(R, G, L)
            ctx.shapes = shapes
            if bias is not None:
                ctx.bias_rows = bias.shape[0]
            return below_autograd(family.transform, below, R, G, L, shapes, bias)

        @staticmethod
        def backward(ctx, dY):
            if dY is None:
                return (None,) * 6
            R, G, L = ctx.saved_tensors
            need_R, need_G, need_L, _, need_bias, _ = ctx.needs_input_grad
            dR = dG = dL = dbias = None
            if need_R or need_G or need_L:
                dR, dG, dL = family.backward(R, G, L, dY, ctx.shapes, [need_R, need_G, need_L])
            if need_bias:
                dbias = sum_over_B(dY, ctx.shapes, ctx.bias_rows)
            return pick(need_R, dR), pick(need_G, dG), pick(need_L, dL), None, dbias, None

    class TransformBackward(Function):
        @staticmethod
        def forward(ctx, R, G, L, dY, shapes, need, below):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(R, G, L, dY)
            ctx.shapes = shapes
            outputs = below_autograd(family.backward, below, R, G, L, dY, shapes, need)
            mark_not_needed(ctx, outputs, need)
            return outputs

        @staticmethod
        def backward(ctx, ddR, ddG, ddL):
            if ddR is None and ddG is None and ddL is None:
                return (None,) * 7
            R, G, L, dY = ctx.saved_tensors
            need = list(ctx.needs_input_grad[:SLOTS])
            if ddR is None and ddL is None and torch.is_grad_enabled():
                # With only ddG, F(R, ddG, L, dY) is the form of the first order: one order less to differentiate again.
                R, L, dY = distinct(R, L, dY)
                wanted = [operand if needed else None for operand, needed in zip((R, None, L, dY), need)]
                gradients = form_gradients(family, ctx.shapes, [(R, ddG, L, dY)], wanted)
                return *gradients, None, None, None
            gradients = family.double_backward(R, G, L, dY, ddR, ddG, ddL, ctx.shapes, need)
            return *map(pick, need, gradients), None, None, None

    class TransformDoubleBackward(Function):
        @staticmethod
        def forward(ctx, R, G, L, dY, ddR, ddG, ddL, shapes, need, below):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(R, G, L, dY, ddR, ddG, ddL)
            ctx.shapes = shapes
            outputs = below_autograd(family.double_backward, below, R, G, L, dY, ddR, ddG, ddL, shapes, need)
            mark_not_needed(ctx, outputs, need)
            return outputs

        @staticmethod
        def backward(ctx, eR, eG, eL, eY):
            R, G, L, Y, A, C, D = distinct(*ctx.saved_tensors)
            eR, eG, eL, eY = distinct(eR, eG, eL, eY)
            # The derivative of F(A,G,L,Y) + F(R,C,L,Y) + F(R,G,D,Y) in the direction (eR, eG, eL, eY) of (R, G, L, Y).
            terms = [
                (A, eG, L, Y), (A, G, eL, Y), (A, G, L, eY),
                (eR, C, L, Y), (R, C, eL, Y), (R, C, L, eY),
                (eR, G, D, Y), (R, eG, D, Y), (R, G, D, eY),
            ]  # fmt: skip
            operands = (R, G, L, Y, A, C, D)
            wanted = [operand if needed else None for operand, needed in zip(operands, ctx.needs_input_grad)]
            return *form_gradients(family, ctx.shapes, terms, wanted), None, None, None

    return Transform, TransformBackward, TransformDoubleBackward


def _empty(like: Tensor, needed: bool, columns: int, rows: int) -> Tensor:
    return like.new_empty((rows, columns)) if needed else like.new_empty((0,))


def _fakes() -> tuple[Callable, Callable, Callable]:
    def transform(R, G, L, shapes, bias=None):
        return G.new_empty(G.shape)

    def backward(R, G, L, dY, shapes, need):
        return tuple(_empty(X, needed, X.shape[1], X.shape[0]) for X, needed in zip((R, G, L), need))

    def double_backward(R, G, L, dY, ddR, ddG, ddL, shapes, need):
        return tuple(_empty(X, needed, X.shape[1], X.shape[0]) for X, needed in zip((R, G, L, dY), need))

    return transform, backward, double_backward


def register(fragment: torch.library.Library, suffix: str = "") -> Family:
    """Register the three orders `kfo_ext::transform*<suffix>` and return them; see `register_operator`."""
    names = [f"transform{suffix}", f"transform_backward{suffix}", f"transform_double_backward{suffix}"]
    family = Family(*(getattr(torch.ops.kfo_ext, name).default for name in names))
    for overload, function, fake, rule in zip(family, _functions(family), _fakes(), rules(family)):
        register_operator(fragment, overload, function, fake, rule, "kfo_ext.transform")
    return family
