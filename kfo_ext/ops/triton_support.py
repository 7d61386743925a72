"""Whether Triton's kernels run here, or the reason why not; imports neither triton nor a driver."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

import torch

_INSTALLED = importlib.util.find_spec("triton") is not None
# Read once, as triton reads it: at import, its functions are made for the interpreter or the compiler.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`."""
    return _INSTALLED and (device.type == "cuda" or (device.type == "cpu" and INTERPRETED))


def reason(device_type: str) -> str:
    """The reason why `available` is false for a device, or the version that runs."""
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if device_type == "cpu" and not INTERPRETED:
        return "Triton's interpreter is off: it needs TRITON_INTERPRET=1 in the environment before kfo_ext is imported"
    if device_type not in ("cpu", "cuda"):
        return f"there are no kernels for {device_type} tensors"
    try:
        name = f"triton {version('triton')}"
    except PackageNotFoundError:
        name = "triton of unknown version"
    return f"{name}, in its interpreter" if INTERPRETED else name


def status() -> tuple[bool, str]:
    """Whether triton runs on this machine, and the reason or the version; queries the driver."""
    if _INSTALLED and not INTERPRETED and not torch.cuda.is_available():
        return False, f"{reason('cuda')}, but torch sees no CUDA device, and {reason('cpu')}"
    return _INSTALLED, reason("cuda")
