"""PEP 517 backend: setuptools', but compiling against the torch that is installed instead of downloading another."""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST_SETUPTOOLS = 77  # the first to read the licence of pyproject.toml
NO_SETUPTOOLS = (
    f"error: kfo_ext is built by setuptools {OLDEST_SETUPTOOLS} or later: "
    f'pip install "setuptools>={OLDEST_SETUPTOOLS}" ninja pybind11, or leave out --no-build-isolation'
)

try:
    import setuptools
    from setuptools import build_meta
    from setuptools.build_meta import *  # noqa: F403  the hooks a frontend looks for
    from setuptools.errors import SetupError
except ImportError:
    # Not an ImportError: a frontend would say that it cannot import this backend.
    raise SystemExit(NO_SETUPTOOLS) from None

HEADER = Path("include/torch/csrc/stable/library.h")


def _torch_places() -> Iterator[Path]:
    if spec := importlib.util.find_spec("torch"):
        yield from map(Path, spec.submodule_search_locations or ())
    yield Path(sysconfig.get_path("purelib")) / "torch"
    yield Path(site.getusersitepackages()) / "torch"
    # A frontend that builds in an environment of its own leaves only the activated one's variables to go by.
    activated = [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ]
    programs = [Path(folder).parent for folder in os.get_exec_path()]
    for prefix in [*activated, *programs, Path(sys.base_prefix)]:
        yield Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(prefix)})) / "torch"


def torch_root() -> Path | None:
    """Find an installed torch package with its headers, without importing it.

    Build isolation hides site-packages from sys.path, but not in the file system.

    Returns:
        Its directory, or None.
    """
    if override := os.environ.get("KFO_TORCH_ROOT"):
        return Path(override)
    return next((place for place in _torch_places() if (place / HEADER).exists()), None)


def _torch() -> list[str]:
    return [] if torch_root() else ["torch>=2.10"]


def _check() -> None:
    """End a build that cannot succeed before a frontend reads metadata or looks for a torch.

    Raises:
        SystemExit: the Python is too old, or a build tool is missing; says which.
    """
    import kfo_toolchain

    try:
        kfo_toolchain.check_platform()
    except SetupError as error:
        raise SystemExit(f"error: {error}") from None
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(f"{NO_SETUPTOOLS}; this is {setuptools.__version__}")


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    _check()
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    _check()
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()


def prepare_metadata_for_build_wheel(folder: str, config_settings: dict | None = None) -> str:
    _check()
    return build_meta.prepare_metadata_for_build_wheel(folder, config_settings)


def prepare_metadata_for_build_editable(folder: str, config_settings: dict | None = None) -> str:
    _check()
    return build_meta.prepare_metadata_for_build_editable(folder, config_settings)
