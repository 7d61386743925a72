"""What torch keeps private and this package needs; where a torch lacks it, the import says so."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import overrides
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch import pyfunctorch, utils
from torch.autograd import forward_ad


def _private(owner: object, name: str) -> Any:
    """A name of torch that is not public; where a torch lacks it, the import fails: a guess could lose a derivative."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ImportError(f"kfo_ext: torch {torch.__version__} has no {name}, which kfo_ext needs") from None


in_functorch = _private(torch._C, "_are_functorch_transforms_active")
functorch_level = _private(torch._C._functorch, "maybe_current_level")
after_autograd = _private(torch._C, "_after_autograd_keyset")
dispatch_modes = _private(torch._C, "_len_torch_dispatch_stack")
jit_trace = _private(torch._C, "_get_tracing_state")
saved_tensor_hooks = partial(_private(torch._C._autograd, "_top_saved_tensors_default_hooks"), True)
_private(forward_ad, "_current_level")

# How many modes see each function of torch, the innermost of them, and a context in which it sees none.
function_modes = _private(overrides, "_len_torch_function_stack")
function_mode = _private(overrides, "_get_current_function_mode")
without_function_mode = _private(overrides, "_pop_mode_temporarily")

# One level of torch.func: its tensors, and what a kernel under its dispatch key needs to reach the next level.
add_batch_dim = _private(torch._C._functorch, "_add_batch_dim")
unwrap_batched = _private(torch._C._functorch, "_unwrap_batched")
innermost_level = _private(torch._C._functorch, "peek_interpreter_stack")
vmap_level = _private(torch._C._functorch, "CVmapInterpreterPtr")
allow_function_of_one_level = _private(utils, "enable_single_level_autograd_function")
_all_levels = _private(torch._C._functorch, "get_interpreter_stack")
_exclude = _private(torch._C, "_ExcludeDispatchKeyGuard")
_transforms = _private(pyfunctorch, "TransformType")
_DERIVATIVES_AND_VMAP = (_transforms.Grad, _transforms.Vmap)
_OF_VMAP = DispatchKeySet(DispatchKey.FuncTorchBatched)


def below_vmap() -> Any:
    """A context for the batching rule of an operator: operators called in it run on the next level of torch.func."""
    return _exclude(_OF_VMAP)


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is under way."""
    return in_functorch() or in_forward_mode()


def without_rules() -> bool:
    """Whether a transform is under way for which only plain torch has every rule.

    Those are forward-mode AD, `jvp` and what is made of it, `functionalize`, and any transform that torch.compile
    traces: for grad, vjp and vmap, nested in any order, operators have rules of their own.
    """
    if in_forward_mode():
        return True
    return in_functorch() and (torch.compiler.is_compiling() or not only_derivatives_and_vmap())


def only_derivatives_and_vmap() -> bool:
    """Whether each torch.func transform under way is grad, vjp or vmap."""
    return all(level.key() in _DERIVATIVES_AND_VMAP for level in _all_levels() or ())
