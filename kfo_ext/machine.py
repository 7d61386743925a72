"""The machine that a process runs on: the environment to store with every result, and its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfo_ext.version import __version__

if TYPE_CHECKING:
    import torch

# Memory limits of a container, in the two versions of Linux control groups.
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20


def environment() -> dict[str, Any]:
    """Describe this process.

    Returns:
        Machine, versions, command, and the git commit of the package if it lies in a checkout. The variable KFO_COMMIT
        names the commit of a copy without a git folder.
    """
    # Imported here, since the command line imports this module before torch.
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions(),
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """The versions of kfo_ext and torch."""
    import torch

    return {"kfo_ext": __version__, "torch": str(torch.__version__)}


def processor_name() -> str:
    """The processor as Linux names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("KFO_COMMIT") or None
    return done.stdout.strip() or None


def available_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes.

    Args:
        device: a CUDA device or the CPU.

    Returns:
        On the CPU, Linux's MemAvailable or the limit of the container, whichever is less; None if unknown.
    """
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    limits = [int(text) for path in _GROUP_LIMITS if (text := _read(path)).isdigit()]
    lines = _read(Path("/proc/meminfo")).splitlines()
    limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory in this process, permanently.

    Otherwise the system zeroes the pages again in every meta-iteration. Blocks above 32 MiB, glibc's limit, are still
    returned to the system.

    Returns:
        Whether glibc accepted it; without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # -1 disables trimming.
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
