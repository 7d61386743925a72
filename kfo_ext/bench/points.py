"""The axes of `kfo bench`: along each one size grows and all others are fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from kfo_ext.bench.names import AXES
from kfo_ext.networks import omniglot_cnn
from kfo_ext.problems import Problems


def _omniglot(layers: int) -> Problems:
    # On meta: importing this module must not draw random numbers.
    with torch.device("meta"):
        return Problems.of(omniglot_cnn(layers).parameters())


# Parameters of the paper's Omniglot networks, and of large single layers, as learn2learn takes parameters.
GROUPS: dict[str, Problems] = {
    "CNN(2)": _omniglot(2),
    "CNN(4)": _omniglot(4),
    "CNN(6)": _omniglot(6),
    "conv_64": Problems.of([torch.empty(64, 64, 3, 3, device="meta")]),
    "head_5x1600": Problems.of([torch.empty(5, 1600, device="meta")]),
}
LAYERS = {2: "CNN(2)", 4: "CNN(4)", 6: "CNN(6)"}
# The meta-batch of the axes that do not vary it; along width 16 tasks would not fit in memory.
TASKS = 16
WIDTH_TASKS = 4
VALUES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 4, 16, 64, 256),
    "layers": (2, 4, 6),
    "width": (1, 4, 16, 64, 256, 784, 1600),
    "hidden": (0, 1, 2, 3),
    "psd": (0, 1),
}
QUICK_VALUES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 16, 64),
    "layers": (2, 4),
    "width": (1, 32, 256),
    "hidden": (0, 2),
    "psd": (0, 1),
}


class Point(NamedTuple):
    """What is measured at one value of an axis.

    Attributes:
        axis: name of the axis.
        x: the value.
        group: name of the problems.
        problems: shapes of the parameters.
        tasks: the number of tasks.
        psd: whether the update has psd.
        hidden: Kronecker layers before the last one.
        rule: the update through `KFO.rule`, else the transform's own ops.
    """

    axis: str
    x: int
    group: str
    problems: Problems
    tasks: int = TASKS
    psd: bool = False
    hidden: int = 0
    rule: bool = False

    @property
    def same(self) -> tuple:
        """A key that is equal for points of different axes that are one measurement."""
        return (self.problems.shapes, self.tasks, self.psd, self.hidden, self.rule)

    @property
    def label(self) -> str:
        """A text such as `tasks=16 CNN(2)`."""
        return f"{self.axis}={self.x} {self.group}"

    @property
    def transforms(self) -> int:
        """The number of Kronecker transforms in sequence: one per layer, and one more for each that is psd."""
        return self.hidden + 1 + (max(1, self.hidden) if self.psd else 0)


def _at(start: Point, x: int) -> Point:
    if start.axis == "psd":
        return start._replace(x=x, psd=bool(x))
    return start._replace(x=x, tasks=x) if start.axis == "tasks" else start._replace(x=x, hidden=x)


def points_of(axes: Sequence[str], groups: Sequence[str], values: Mapping[str, tuple[int, ...]]) -> list[Point]:
    """Collect the points of some axes.

    Args:
        axes: names of the axes.
        groups: names of the problems, for the axes tasks, hidden and psd.
        values: of every axis.

    Returns:
        The points, axis after axis.

    Raises:
        ValueError: an axis or group is unknown.
    """
    for name, given, known in (("axes", axes, AXES), ("groups", groups, GROUPS)):
        for item in given:
            if item not in known:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {item!r}")
    points = []
    for axis in axes:
        if axis == "layers":
            points += [Point(axis, x, LAYERS[x], GROUPS[LAYERS[x]]) for x in values[axis]]
        elif axis == "width":
            squares = {x: Problems.of([torch.empty(x, x, device="meta")]) for x in values[axis]}
            points += [Point(axis, x, "square", problems, WIDTH_TASKS) for x, problems in squares.items()]
        else:
            for group in groups:
                start = Point(axis, 0, group, GROUPS[group], rule=axis != "tasks")
                points += [_at(start, x) for x in values[axis]]
    return points
