"""Functions of this package that `fast_layers` does not intercept: they call no layer, but read hundreds of shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from kfo_ext.ops.torch_private import function_mode, function_modes, without_function_mode

F = TypeVar("F", bound=Callable[..., Any])


class LayerMode(TorchFunctionMode):
    """A mode that replaces layers; functions of this package suspend it."""


def own_code(function: F) -> F:
    """Decorate a function to suspend an enclosing `LayerMode`; other modes still intercept its calls.

    Args:
        function: a function that accepts tensors of any memory format.

    Returns:
        The decorated function.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A compiler traces nothing beyond this test.
        if not function_modes() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not isinstance(function_mode(), LayerMode):
            return function(*args, **kwargs)
        with without_function_mode():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
