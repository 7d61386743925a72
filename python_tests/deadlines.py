"""How long a test waits for a process before it gives it up."""

from __future__ import annotations

import os


def seconds(limit: float) -> float:
    """The limit, times KFO_TEST_TIMEOUT_SCALE."""
    return limit * float(os.environ.get("KFO_TEST_TIMEOUT_SCALE", "1"))
