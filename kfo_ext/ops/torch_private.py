"""What torch keeps private and this package needs; where a torch lacks it, the import says so."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
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


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is under way: there only plain torch has every rule."""
    return in_functorch() or in_forward_mode()
