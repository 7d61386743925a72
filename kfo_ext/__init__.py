"""Kronecker-factored learned updates (META-KFO) for torch: exact, fast, and easy to drop into any code."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kfo_ext.lazy import lazily

# For a source tree: an installation is refused by pip.
if sys.version_info < (3, 10):  # noqa: UP036
    raise ImportError(f"kfo_ext needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]}")

if TYPE_CHECKING:
    from kfo_ext.adapt import ANIL, MAML, Adapted, MetaResult
    from kfo_ext.transform import Problems, transform
    from kfo_ext.updates import KFO, Update
    from kfo_ext.version import __version__

__all__ = ["ANIL", "KFO", "MAML", "Adapted", "MetaResult", "Problems", "Update", "__version__", "transform"]

__getattr__, __dir__ = lazily(
    globals(),
    {
        "adapt": ["ANIL", "MAML", "Adapted", "MetaResult"],
        "transform": ["Problems", "transform"],
        "updates": ["KFO", "Update"],
        "version": ["__version__"],
    },
)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import of the room `transform` would put the module in the place of the function.
        if not (name == "transform" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
