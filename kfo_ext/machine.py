"""The machine that a process runs on: what goes with every number, and its memory."""

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

# Limits of a container, of the two versions of Linux control groups.
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20


def environment() -> dict[str, Any]:
    """Describe this process: machine, versions, git commit of the package if it lies in a checkout, command."""
    # Here, since the command line asks this module before it needs torch.
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
    """Those of kfo_ext and torch."""
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
        return None
    return done.stdout.strip() or None


def available_bytes(device: torch.device) -> int | None:
    """Memory that a device has left, None where it does not say.

    On the CPU that is Linux's MemAvailable, or the limit of the container where that is less.
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
    """Tells glibc not to give freed memory back to the system, for this whole process and for good.

    Otherwise every meta-iteration has its pages zeroed by the system again. Pieces above 32 MiB, glibc's limit, still
    go back.

    out: whether there is a glibc that took it; without one nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # -1 is never to trim.
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
