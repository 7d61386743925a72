"""Registration of an operator's fake, autograd, vmap and autocast; its schema and kernels exist already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import FunctionCtx

from kfo_ext.ops.mapping import Rule, batching
from kfo_ext.ops.torch_private import (
    after_autograd,
    allow_function_of_one_level,
    in_forward_mode,
    in_functorch,
    without_rules,
)


def pick(needed: bool, gradient: Tensor | None) -> Tensor | None:
    return gradient if needed else None


def mark_not_needed(ctx: FunctionCtx, outputs: Sequence[Tensor], need: Sequence[bool]) -> None:
    """Tells autograd that the empty tensors in the place of outputs that are not needed have no derivative."""
    if False in need:
        ctx.mark_non_differentiable(*(out for out, needed in zip(outputs, need) if not needed))


def below_autograd(overload: torch._ops.OpOverload, below: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """What the forward of an operator's Function computes; below: the keyset that its kernel has been given."""
    if not in_functorch():
        return overload.redispatch(below, *arguments)
    # A Function turns grad mode off; the transforms further out have their own derivative to take.
    with torch.enable_grad():
        return overload.redispatch(below, *arguments)


def _kernel(overload: torch._ops.OpOverload, function: type[Function], public: str) -> Callable:
    """The kernel under the Autograd key: differentiates by `function`, and refuses what it has no rule for.

    For torch.func's grad and vjp it is called once on each of their levels, as the derivatives of torch's own
    operators are, with that level's tensors: `redispatch` reaches the next one.
    """
    schema = overload._schema.arguments
    defaults = (None,) * len(schema)
    tensors = [i for i, argument in enumerate(schema) if "Tensor" in str(argument.type)]
    # Function.apply itself would start anew from the innermost transform, where the dispatcher has come from already.
    apply = super(Function, function).apply  # type: ignore[misc]  # of torch's C++ base class

    def kernel(keyset, *arguments):
        # The dispatcher leaves out trailing arguments that have their default, here always None.
        arguments += defaults[len(arguments) :]
        levels = in_functorch()
        if levels and without_rules():
            raise NotImplementedError(
                f"{overload.name()} has no rule for torch.func transforms other than grad, vjp and vmap, nor for those "
                f"in forward mode or under torch.compile: call {public} inside them, which runs plain torch there"
            )
        if not levels and in_forward_mode() and any(_has_tangent(arguments[i]) for i in tensors):
            raise NotImplementedError(
                f"{overload.name()} has no rule for forward-mode AD: call {public}, which runs plain torch there"
            )
        below = keyset & after_autograd
        try:
            if torch.is_grad_enabled():
                for i in tensors:
                    operand = arguments[i]
                    if operand is not None and operand.requires_grad:
                        if not levels:
                            return apply(*arguments, below)
                        with allow_function_of_one_level():
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
    rule: Rule,
    public: str,
) -> None:
    """Registers fake, autograd, vmap and autocast of one operator, whose schema and kernels exist already.

    Must run at import, before any call: a late registration leaves stale dispatch behind.

    Args:
        fragment: where the registrations belong.
        overload: the operator.
        function: its derivative; takes the operator's arguments, and last what `below_autograd` needs.
        fake: its outputs without data.
        rule: what it does under torch.func.vmap; see `kfo_ext.ops.mapping`.
        public: the function that messages name, for what the operator has no rule for.
    """
    name = overload.name()
    torch.library.register_fake(name, fake, lib=fragment)
    fragment.impl(name.partition("::")[2], _kernel(overload, function, public), "Autograd", with_keyset=True)
    fragment.impl(name.partition("::")[2], batching(overload, rule), "FuncTorchBatched")
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(name, device, torch.float32, lib=fragment)
