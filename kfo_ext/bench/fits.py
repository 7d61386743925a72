"""The growth of a cost with size: the exponent of a power law, and steps that cost more than expected."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from kfo_ext.bench.result import Row

# The columns that identify a curve.
CURVE = ("axis", "group", "order", "provider", "mode")
# A doubled size may double the cost, or over a range quadruple it; more than this within one step is a cliff.
STEEP = 3.0


def upper_half(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of the larger sizes: half of them, rounded up, and at least two."""
    ordered = sorted(points)
    return ordered[-max(2, math.ceil(len(ordered) / 2)) :]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Fit the slope of log y over log x by least squares.

    Args:
        points: two or more (x, y), positive, with different x.

    Returns:
        The slope.

    Raises:
        ValueError: there are too few points, or a size or time is not positive.
    """
    if len({x for x, _ in points}) < 2 or min(min(point) for point in points) <= 0:
        raise ValueError(f"points: expected positive sizes and times of at least 2 sizes, got {list(points)}")
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def cliffs(points: Sequence[tuple[float, float]], steep: float = STEEP) -> list[tuple[float, float, float]]:
    """Find the steps that cost more than `steep` per doubling of the size; for a factor f, more than steep^log2(f).

    Args:
        points: (size, cost), positive, sizes ascending.
        steep: the allowed cost ratio of a doubled size.

    Returns:
        (size before, size after, cost ratio) of each such step.
    """
    return [
        (size, larger, more / cost)
        for (size, cost), (larger, more) in pairwise(points)
        if more / cost > steep ** math.log2(larger / size)
    ]


def fits(rows: Sequence[Row]) -> list[Row]:
    """Fit the exponent of each measured curve over the upper half of its sizes.

    The size along `hidden` is the number of Kronecker layers; `psd` has no size; along `layers` the groups are one
    curve.

    Args:
        rows: of a result.

    Returns:
        One row per curve.
    """
    curves: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["status"] != "ok" or row["axis"] == "psd":
            continue
        key = {name: row[name] for name in CURVE}
        if row["axis"] == "layers":
            key["group"] = "CNN"
        size = row["x"] + 1 if row["axis"] == "hidden" else row["x"]
        curves[tuple(key.values())].append((size, row["median_s"]))
    return [
        {
            **dict(zip(CURVE, key)),
            "exponent": exponent(used),
            "from": used[0][0],
            "to": used[-1][0],
            "points": len(used),
        }
        for key, points in curves.items()
        if len(points) > 1
        for used in [upper_half(points)]
    ]
