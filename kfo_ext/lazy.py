"""Names of a package that are imported when they are first asked for: `kfo --help` waits for none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Lookup = tuple[Callable[[str], Any], Callable[[], list[str]]]


def lazily(namespace: dict[str, Any], modules: Mapping[str, Sequence[str]]) -> Lookup:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    namespace: the package's globals()
    modules: each module of the package to the public names that it defines
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
