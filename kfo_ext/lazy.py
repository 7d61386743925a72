"""Names of a package that are imported at first access: `kfo --help` imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Lookup = tuple[Callable[[str], Any], Callable[[], list[str]]]


def lazily(namespace: dict[str, Any], modules: Mapping[str, Sequence[str]]) -> Lookup:
    """Make `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        namespace: the package's globals().
        modules: the public names of each module of the package.

    Returns:
        The two functions.
    """
    package = namespace["__name__"]
    sources = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(importlib.import_module(sources[name]), name)
        return namespace[name]

    def __dir__() -> list[str]:
        return sorted({*namespace, *sources})

    return __getattr__, __dir__
