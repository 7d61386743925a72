"""95 % intervals from Student's t, and the verdict on a claim."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import mpmath
from torch import Tensor

LEVEL = 0.95
REPRODUCED, REVERSED, UNDECIDED = "reproduced", "reversed", "undecided"
# A closed interval.
Range = tuple[float, float]


def half_width(values: Tensor) -> float | None:
    """Return half the width of the 95 % interval of a mean.

    Args:
        values: (n,) independent values.

    Returns:
        The half width, or None for a single value, which has no interval.

    Raises:
        ValueError: the shape differs, there is no value, or a value is not finite.
    """
    values = values.double()
    if values.dim() != 1 or len(values) == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"values: expected finite numbers, at least one, of shape (n,), got {values}")
    if len(values) == 1:
        return None
    return _student(len(values) - 1) * float(values.std()) / math.sqrt(len(values))


@lru_cache(maxsize=64)
def _student(freedom: int) -> float:
    """The number that Student's t exceeds, either way, with probability 1 - LEVEL."""

    def outside(t: mpmath.mpf) -> mpmath.mpf:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - (1 - LEVEL)

    # 12.7 for one degree of freedom, less for more.
    return float(mpmath.findroot(outside, (1.5, 13), solver="anderson"))


def verdict(intervals: Iterable[Range], claimed: Range) -> str:
    """Decide a claim that values lie in a range, from their intervals.

    Args:
        intervals: lower and upper end of each; without any, the claim is undecided.
        claimed: the range.

    Returns:
        "reproduced" if all intervals lie in the range, "reversed" if all lie outside, else "undecided".
    """
    lowest, highest = claimed
    found = [
        REPRODUCED if lowest <= low and high <= highest else REVERSED if high < lowest or highest < low else UNDECIDED
        for low, high in intervals
    ]
    return found[0] if len(set(found)) == 1 else UNDECIDED
