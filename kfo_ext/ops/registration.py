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
    """The gradient if it is needed, else None."""
    return gradient if needed else None


def mark_not_needed(ctx: FunctionCtx, outputs: Sequence[Tensor], need: Sequence[bool]) -> None:
    """Tell autograd that the empty tensors for outputs that are not needed have no derivative."""
    if False in need:
        ctx.mark_non_differentiable(*(out for out, needed in zip(outputs, need) if not needed))


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """`function.apply` without its handling of torch.func's transforms, which takes microseconds."""
    return super(Function, function).apply  # type: ignore[misc]  # torch's C++ base class


def check_memory(overload: torch._ops.OpOverload, operand: Tensor, error: RuntimeError) -> None:
    """Raise OutOfMemoryError if that is what an error of the kernels, which run on the operand's device, means."""
    # torch's stable ABI replaces the allocator's error by one that names the failed call.
    if "aten::new_empty" not in str(error):
        return
    device = operand.device
    earlier = "" if device.type == "cpu" else ", or an earlier error of the device"
    raise torch.OutOfMemoryError(
        f"{overload.name()}: no memory left on {device} for its outputs or its scratch memory{earlier}"
    ) from error


def below_autograd(overload: torch._ops.OpOverload, below: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """The forward of an operator's Function; below: the keyset of its kernel."""
    if not in_functorch():
        return overload.redispatch(below, *arguments)
    # A Function turns grad mode off, but outer transforms differentiate, too.
    with torch.enable_grad():
        return overload.redispatch(below, *arguments)


def _kernel(overload: torch._ops.OpOverload, function: type[Function], public: str) -> Callable:
    """Make the kernel for the Autograd key, which differentiates by `function` and refuses transforms without a rule.

    For torch.func's grad and vjp it is called once on each level, with that level's tensors, like the derivatives of
    torch's own operators: `redispatch` reaches the next level.

    Args:
        overload: the operator.
        function: its derivative.
        public: the function that messages name.

    Returns:
        The kernel.
    """
    schema = overload._schema.arguments
    defaults = (None,) * len(schema)
    tensors = [i for i, argument in enumerate(schema) if "Tensor" in str(argument.type)]
    # Function.apply itself would restart from the innermost transform, which the dispatcher has passed.
    apply = apply_of(function)

    def kernel(keyset, *arguments):
        # The dispatcher omits trailing arguments that have their default, here always None.
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
            check_memory(overload, arguments[0], error)
            raise

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
    """Register fake, autograd, vmap and autocast of one operator, whose schema and kernels exist already.

    It must run at import, before any call: a late registration leaves stale dispatch.

    Args:
        fragment: the library of the registrations.
        overload: the operator.
        function: its derivative; takes the operator's arguments, and then the keyset for `below_autograd`.
        fake: its outputs without data.
        rule: its rule for torch.func.vmap; see `kfo_ext.ops.mapping`.
        public: the function that messages name, for transforms without a rule.
    """
    name = overload.name()
    torch.library.register_fake(name, fake, lib=fragment)
    fragment.impl(name.partition("::")[2], _kernel(overload, function, public), "Autograd", with_keyset=True)
    fragment.impl(name.partition("::")[2], batching(overload, rule), "FuncTorchBatched")
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(name, device, torch.float32, lib=fragment)
