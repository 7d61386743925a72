"""Freed memory that stays with the process: a meta-iteration frees all it made, and the next one asks for it again."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20


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
