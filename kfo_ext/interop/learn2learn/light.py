"""A light import of learn2learn, without the parts that its algorithms do not need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RECIPE = (
    "learn2learn is not installed. Its source distribution needs Cython at build time:\n"
    "  pip install cython setuptools wheel\n"
    "  pip install --no-build-isolation --use-pep517 --no-deps --no-binary learn2learn"
    " --config-settings=--global-option=build_ext learn2learn==0.2.0"
)
# Submodules that the light module omits.
_HEAVY = ("data", "gym", "text", "vision")


def light_import() -> ModuleType:
    """Import learn2learn, or only its utils, nn, optim and algorithms if its other requirements are missing.

    The light module stays in `sys.modules`; it requires torch and numpy. It has all of `algorithms` (GBML, MAML,
    MetaSGD, maml_update, meta_sgd_update; the Lightning classes raise learn2learn's own ImportError without
    pytorch_lightning), `optim` and `nn` (SVClassifier requires qpth when called), and the functions of `utils`, such as
    clone_module, update_module and detach_module. It has no data, gym, text or vision: accessing one raises an
    AttributeError that names the missing requirement.

    Returns:
        The module.

    Raises:
        ImportError: learn2learn is not installed; the message holds the commands that install it.
    """
    loaded = sys.modules.get("learn2learn")
    if loaded is not None:
        return loaded
    spec = _find_spec()
    if spec is None:
        raise ImportError(RECIPE)
    try:
        return importlib.import_module("learn2learn")
    # torchvision raises RuntimeError with a torch it was not built for, gym AttributeError with a new numpy.
    except (ImportError, RuntimeError, AttributeError) as error:
        return _import_core(spec, f"{type(error).__name__}: {error}")


def _find_spec() -> ModuleSpec | None:
    try:
        return importlib.util.find_spec("learn2learn")
    except ValueError:  # sys.modules["learn2learn"] is None: its import is blocked
        return None


def _import_core(spec: ModuleSpec, why: str) -> ModuleType:
    _forget()
    module = ModuleType("learn2learn")
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["learn2learn"] = module
    try:
        for name, public in (("_version", ["__version__"]), ("utils", None)):
            part = vars(importlib.import_module(f"learn2learn.{name}"))
            names = public or [name for name in part if not name.startswith("_")]
            vars(module).update({name: part[name] for name in names})
        for name in ("nn", "optim", "algorithms"):
            importlib.import_module(f"learn2learn.{name}")
    except BaseException:
        _forget()
        raise
    vars(module)["__getattr__"] = _Absent(why)
    return module


class _Absent:
    """The light module's `__getattr__`: raises AttributeError with the reason.

    Args:
        why: the error of the full import.
    """

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, name: str) -> Any:
        reason = f" in this light import, because `import learn2learn` failed: {self.why}" if name in _HEAVY else ""
        raise AttributeError(f"module 'learn2learn' has no attribute {name!r}{reason}")


def _forget() -> None:
    for name in [name for name in sys.modules if name == "learn2learn" or name.startswith("learn2learn.")]:
        del sys.modules[name]
