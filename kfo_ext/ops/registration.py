"""Registration of an operator's fake, autograd and autocast; its schema and kernels exist already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from kfo_ext.ops.torch_private import after_autograd, in_forward_mode, in_functorch


def pick(needed: bool, gradient: Tensor | None) -> Tensor | None:
    return gradient if needed else None


def mark_not_needed(ctx: FunctionCtx, outputs: Sequence[Tensor], need: Sequence[bool]) -> None:
    """Tells autograd that the empty tensors in the place of outputs that are not needed have no derivative."""
    if False in need:
        ctx.mark_non_differentiable(*(out for out, needed in zip(outputs, need) if not needed))


def _kernel(overload: torch._ops.OpOverload, function: type[Function], public: str) -> Callable:
    """The kernel under the Autograd key: differentiates by `function`, and refuses what it has no rule for."""
    schema = overload._schema.arguments
    defaults = (None,) * len(schema)
    tensors = [i for i, argument in enumerate(schema) if "Tensor" in str(argument.type)]
    # Function.apply itself first looks for what functorch left behind, which the dispatcher has dealt with already.
    apply = super(Function, function).apply  # type: ignore[misc]  # of torch's C++ base class

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
        below = keyset & after_autograd
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


def register_operator(
    fragment: torch.library.Library,
    overload: torch._ops.OpOverload,
    function: type[Function],
    fake: Callable,
    public: str,
) -> None:
    """Registers fake, autograd and autocast of one operator, whose schema and kernels exist already.

    Must run at import, before any call: a late registration leaves stale dispatch behind.

    Args:
        fragment: where the registrations belong.
        overload: the operator.
        function: its derivative; takes the operator's arguments, and last the keyset to redispatch it with.
        fake: its outputs without data.
        public: the function that messages name, for what the operator has no rule for.
    """
    name = overload.name()
    torch.library.register_fake(name, fake, lib=fragment)
    fragment.impl(name.partition("::")[2], _kernel(overload, function, public), "Autograd", with_keyset=True)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(name, device, torch.float32, lib=fragment)
