"""The private names of torch that this package uses; the import fails if torch lacks one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import overrides
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch import pyfunctorch, utils
from torch._functorch import vmap as _vmap
from torch.autograd import forward_ad


def _private(owner: object, name: str) -> Any:
    """A private name of torch; raises ImportError without it, since a guess could lose a derivative."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ImportError(f"kfo_ext: torch {torch.__version__} has no {name}, which kfo_ext requires") from None


in_functorch = _private(torch._C, "_are_functorch_transforms_active")
functorch_level = _private(torch._C._functorch, "maybe_current_level")
below_autograd_and_views = _private(torch._C, "_AutoDispatchBelowADInplaceOrView")
after_autograd = _private(torch._C, "_after_autograd_keyset")
dispatch_keys = _private(torch._C, "_dispatch_keys")
dispatch_modes = _private(torch._C, "_len_torch_dispatch_stack")
jit_trace = _private(torch._C, "_get_tracing_state")
saved_tensor_hooks = partial(_private(torch._C._autograd, "_top_saved_tensors_default_hooks"), True)
_private(forward_ad, "_current_level")

# The number of function modes, the innermost one, and a context that suspends it.
function_modes = _private(overrides, "_len_torch_function_stack")
function_mode = _private(overrides, "_get_current_function_mode")
without_function_mode = _private(overrides, "_pop_mode_temporarily")

# One level of torch.func: its tensors, and how a kernel under its dispatch key reaches the next level.
add_batch_dim = _private(torch._C._functorch, "_add_batch_dim")
remove_batch_dim = _private(torch._C._functorch, "_remove_batch_dim")
enter_vmap = _private(torch._C._functorch, "_vmap_increment_nesting")
leave_vmap = _private(torch._C._functorch, "_vmap_decrement_nesting")
load_decompositions = _private(_vmap, "lazy_load_decompositions")
suspend_innermost = _private(torch._C._functorch, "pop_dynamic_layer_stack")
resume_innermost = _private(torch._C._functorch, "push_dynamic_layer_stack")
unwrap_batched = _private(torch._C._functorch, "_unwrap_batched")
innermost_level = _private(torch._C._functorch, "peek_interpreter_stack")
vmap_level = _private(torch._C._functorch, "CVmapInterpreterPtr")
allow_function_of_one_level = _private(utils, "enable_single_level_autograd_function")
_all_levels = _private(torch._C._functorch, "get_interpreter_stack")
_exclude = _private(torch._C, "_ExcludeDispatchKeyGuard")
_transforms = _private(pyfunctorch, "TransformType")
VMAP = _transforms.Vmap
_DERIVATIVES_AND_VMAP = (_transforms.Grad, VMAP)
_OF_VMAP = DispatchKeySet(DispatchKey.FuncTorchBatched)


def below_vmap() -> Any:
    """The context of an operator's batching rule: operators called in it run on the next level of torch.func."""
    return _exclude(_OF_VMAP)


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is active."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return in_functorch() or in_forward_mode()


def without_rules() -> bool:
    """Return whether a transform is active for which only plain torch has every rule.

    Operators have rules for grad, vjp and vmap, nested in any order.

    Returns:
        True for forward-mode AD, `jvp` and functions based on it, `functionalize`, and any transform that torch.compile
        traces.
    """
    if in_forward_mode():
        return True
    return in_functorch() and (torch.compiler.is_compiling() or not only_derivatives_and_vmap())


def only_derivatives_and_vmap() -> bool:
    """Whether each active torch.func transform is grad, vjp or vmap."""
    return all(level.key() in _DERIVATIVES_AND_VMAP for level in _all_levels() or ())
