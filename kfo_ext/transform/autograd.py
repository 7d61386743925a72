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
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from kfo_ext.transform.reference import sum_over_B


def _private(owner: object, name: str):
    """A name of torch that is not public; where a torch lacks it, the import fails: a guess could lose a derivative."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ImportError(f"kfo_ext: torch {torch.__version__} has no {name}, which kfo_ext needs") from None


in_functorch = _private(torch._C, "_are_functorch_transforms_active")
_after_autograd = _private(torch._C, "_after_autograd_keyset")
_private(forward_ad, "_current_level")


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is under way: there only plain torch has every rule."""
    return in_functorch() or in_forward_mode()


class Family(NamedTuple):
    """The overloads of the three orders that one backend registers."""

    transform: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    double_backward: torch._ops.OpOverload


# One term of a sum of forms: the operands in the slots R, G, L, Y; a term with a missing operand is zero.
Term = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
SLOTS = 4


def form_gradients(
    family: Family, shapes: list[int], terms: Sequence[Term], wanted: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of sum_terms F(R, G, L, Y) by each wanted operand (compared by identity), None where it is zero."""
    gradients: list[Tensor | None] = [None] * len(wanted)

    def add(slot_value: Tensor, gradient: Tensor) -> None:
        for i, operand in enumerate(wanted):
            if operand is slot_value:
                gradients[i] = gradient if gradients[i] is None else gradients[i] + gradient
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
    """Aliases, so that one tensor in two slots stays two operands for `form_gradients`."""
    return [None if operand is None else operand.view_as(operand) for operand in operands]


def pick(needed: bool, gradient: Tensor | None) -> Tensor | None:
    return gradient if needed else None


def mark_not_needed(ctx: FunctionCtx, outputs: Sequence[Tensor], need: Sequence[bool]) -> None:
    """Tells autograd that the empty tensors in the place of outputs that are not needed have no derivative."""
    if False in need:
        ctx.mark_non_differentiable(*(out for out, needed in zip(outputs, need) if not needed))


def _functions(family: Family) -> tuple[type[Function], type[Function], type[Function]]:
    class Transform(Function):
        @staticmethod
        def forward(ctx, R, G, L, shapes, bias, below):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(R, G, L)
            ctx.shapes = shapes
            if bias is not None:
                ctx.bias_rows = bias.shape[0]
            return family.transform.redispatch(below, R, G, L, shapes, bias)

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
            outputs = family.backward.redispatch(below, R, G, L, dY, shapes, need)
            mark_not_needed(ctx, outputs, need)
            return outputs

        @staticmethod
        def backward(ctx, ddR, ddG, ddL):
            if ddR is None and ddG is None and ddL is None:
                return (None,) * 7
            R, G, L, dY = ctx.saved_tensors
            need = list(ctx.needs_input_grad[:SLOTS])
            if ddR is None and ddL is None and torch.is_grad_enabled():
                # With ddG alone, F(R, ddG, L, dY) is the first order's form: one order less to differentiate again.
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
            outputs = family.double_backward.redispatch(below, R, G, L, dY, ddR, ddG, ddL, shapes, need)
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


def _kernel(overload: torch._ops.OpOverload, function: type[Function], public: str) -> Callable:
    """The kernel under the Autograd key: differentiates by `function`, and refuses what it has no rule for."""
    schema = overload._schema.arguments
    defaults = (None,) * len(schema)
    tensors = [i for i, argument in enumerate(schema) if "Tensor" in str(argument.type)]
    # Function.apply itself first looks for what functorch left behind, which the dispatcher has dealt with already.
    apply = super(Function, function).apply

    def kernel(keyset, *arguments):
        # The dispatcher leaves out trailing arguments that have their default, here always None.
        arguments += defaults[len(arguments) :]
        if in_functorch():
            raise NotImplementedError(
                f"{overload.name()} has no rule for torch.func transforms: call {public}, which runs plain torch there"
            )
        if in_forward_mode() and any(_has_tangent(arguments[i]) for i in tensors):
            raise NotImplementedError(
                f"{overload.name()} has no rule for forward-mode AD: call {public}, which runs plain torch there"
            )
        below = keyset & _after_autograd
        try:
            if torch.is_grad_enabled():
                for i in tensors:
                    operand = arguments[i]
                    if operand is not None and operand.requires_grad:
                        return apply(*arguments, below)
            return overload.redispatch(below, *arguments)
        except RuntimeError as error:
            # The allocator's own error does not pass torch's stable ABI: what arrives names a call that failed.
            if "aten::new_empty" not in str(error):
                raise
            device = arguments[0].device
            earlier = "" if device.type == "cpu" else ", or an earlier error of the device"
            raise torch.OutOfMemoryError(
                f"{overload.name()}: no memory left on {device} for its outputs or its scratch memory{earlier}"
            ) from error

    return kernel


def _has_tangent(operand: Tensor | None) -> bool:
    return operand is not None and forward_ad.unpack_dual(operand).tangent is not None


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


def register_operator(
    library: torch.library.Library,
    overload: torch._ops.OpOverload,
    function: type[Function],
    fake: Callable,
    public: str,
) -> None:
    """Registers fake, autograd and autocast of one operator, whose schema and kernels exist already.

    Must run at import, before any call: a late registration leaves stale dispatch behind.

    Args:
        library: where the registrations belong.
        overload: the operator.
        function: its derivative; takes the operator's arguments, and last the keyset to redispatch it with.
        fake: its outputs without data.
        public: the function that messages name, for what the operator has no rule for.
    """
    name = overload.name()
    torch.library.register_fake(name, fake, lib=library)
    library.impl(name.partition("::")[2], _kernel(overload, function, public), "Autograd", with_keyset=True)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(name, device, torch.float32, lib=library)


def register(library: torch.library.Library, suffix: str = "") -> Family:
    """Registers the three orders `kfo_ext::transform*<suffix>`; see `register_operator`."""
    names = [f"transform{suffix}", f"transform_backward{suffix}", f"transform_double_backward{suffix}"]
    family = Family(*(getattr(torch.ops.kfo_ext, name).default for name in names))
    for overload, function, fake in zip(family, _functions(family), _fakes()):
        register_operator(library, overload, function, fake, "kfo_ext.transform.transform")
    return family
