"""Whether this machine's driver and GPUs run the compiled CUDA library; nothing here runs at import."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path

import torch

OLDEST_CAPABILITY = (8, 0)


def versions(library: Path) -> tuple[int, int]:
    """Read versions of CUDA without initialising the driver.

    Args:
        library: the CUDA library of kfo_ext.

    Returns:
        The latest version that the driver supports, 0 without a driver, and that of the library; 13000 is 13.0.
    """
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(library)).kfo_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value


def generations() -> set[int]:
    """The major capabilities that the library has machine code for."""
    names = importlib.import_module("kfo_ext._plan").build_info()["architectures"]
    return {int(name.removeprefix("sm_")) // 10 for name in names if name.startswith("sm_")}


def problem(library: Path, index: int | None) -> str:
    """Check driver and device.

    Args:
        library: the CUDA library of kfo_ext.
        index: of the device; None checks the driver alone, whose version may still be too old for a device of a
            generation that the library has no machine code for.

    Returns:
        Why the library does not run, or "".
    """
    driver, runtime = versions(library)
    if not driver:
        return "there is no CUDA driver: install NVIDIA's"
    # Any driver of a generation of CUDA runs the machine code of all its versions.
    oldest, why = runtime // 1000 * 1000, ""
    if index is not None:
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            return f"it needs a GPU of compute capability 8.0 or later, cuda:{index} is of {_text(capability)}"
        if capability[0] not in generations():
            oldest, why = runtime, f" to compile for cuda:{index}, of compute capability {_text(capability)}"
    if driver < oldest:
        return (
            f"it needs a driver for CUDA {_version(oldest)} or later{why}, that of this machine is for "
            f"{_version(driver)}: update NVIDIA's driver"
        )
    return ""


def _text(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
