"""The activations between Kronecker layers, and the names that identify an activation in a state_dict."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "softplus": nn.functional.softplus,
}


def activation_name(activation: str | Callable[[Tensor], Tensor]) -> str | None:
    """Find the name of an activation that means the same function in another process.

    Args:
        activation: a name, a function or a module.

    Returns:
        A name such as "tanh", "torch.sin" or "my_module.act"; None if there is none, as for a lambda, a closure, a
        partial, a bound method, or a module that is not torch's own.
    """
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        # The repr of torch's own activations contains everything that they compute with.
        own = type(activation).__module__ == "torch.nn.modules.activation"
        return f"torch.nn.{type(activation).__name__}({activation.extra_repr()})" if own else None
    for name, function in ACTIVATIONS.items():
        if activation is function:
            return name
    # torch's compiled functions have no module of their own.
    places = [(getattr(activation, "__module__", None) or "", "__qualname__"), ("torch", "__name__")]
    for module, attribute in places:
        name = getattr(activation, attribute, "")
        found: object = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is activation:
            return f"{module}.{name}"
    return None
