"""Clones of modules within a graph, and substitution of their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def cloned(module: M) -> M:
    """Return a copy whose parameters are clones of the module's own, so that gradients of the copy reach them.

    Args:
        module: the module.

    Returns:
        The copy. It keeps ties of parameters and submodules. It shares buffers, such as running statistics, unless they
        require a gradient.
    """
    return cast(M, _cloned(module, {}))


def _cloned(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    if id(module) in made:
        return cast(nn.Module, made[id(module)])
    copy = made[id(module)] = module.__new__(type(module))
    copy.__dict__ = module.__dict__.copy()
    for kind in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[kind] = module.__dict__[kind].copy()
    for name, part in module._modules.items():
        copy._modules[name] = None if part is None else _cloned(part, made)
    for own, clones in ((module._parameters, copy._parameters), (module._buffers, copy._buffers)):
        for name, X in own.items():
            if X is None or (own is module._buffers and not X.requires_grad):
                continue
            if id(X) not in made:
                made[id(X)] = X.clone()
            clones[name] = made[id(X)]
    return copy


def replace_parameters(module: nn.Module, values: Iterable[Tensor | None]) -> None:
    """Substitute a tensor for each of `module.parameters()`, wherever it occurs; None keeps the parameter."""
    old = list(module.parameters())
    new = {id(parameter): value for parameter, value in zip(old, values, strict=True) if value is not None}
    for part in module.modules():
        own = cast("dict[str, Tensor | None]", part._parameters)
        own.update({name: new[id(X)] for name, X in own.items() if id(X) in new})
