"""What of this package `fast_layers` need not see: it calls no layer, and reads hundreds of shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from kfo_ext.ops.torch_private import function_mode, function_modes, without_function_mode

F = TypeVar("F", bound=Callable[..., Any])


class LayerMode(TorchFunctionMode):
    """A mode that replaces layers, and has nothing to do within functions of this package."""


def own_code(function: F) -> F:
    """A function that runs unseen by a `LayerMode` around it; it takes tensors however they lie in memory.

    Any other mode sees what is called.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A compiler follows only what stands before.
        if torch.compiler.is_compiling() or not function_modes():
            return function(*args, **kwargs)
        if not isinstance(function_mode(), LayerMode):
            return function(*args, **kwargs)
        with without_function_mode():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
