"""PEP 517 backend: setuptools', but compiling against the torch that is installed instead of downloading another."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks a frontend looks for

HEADER = Path("include/torch/csrc/stable/library.h")


def torch_root() -> Path | None:
    """The directory of an installed torch package with its headers, or None; torch is not imported.

    Build isolation hides site-packages from sys.path, but sysconfig still names the user's.
    """
    if override := os.environ.get("KFO_TORCH_ROOT"):
        return Path(override)
    spec = importlib.util.find_spec("torch")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    places += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("purelib", "platlib")]
    return next((place for place in places if (place / HEADER).exists()), None)


def _torch() -> list[str]:
    return [] if torch_root() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
