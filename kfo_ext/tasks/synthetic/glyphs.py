"""Glyphs: procedural characters of a few pen strokes, a stand-in for Omniglot that needs no data."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.tasks.checks import check_split
from kfo_ext.tasks.images import ImageClasses

CLASSES = {"train": 400, "validation": 60, "test": 160}
DRAWERS = 20
SIDE = 28
STROKES = 4
POINTS = 48
# Characters drawn at a time; divides their number.
CHUNK = 20
# The characters are a data set: they do not depend on a run's seed.
UNIVERSE_SEED = 28


class Glyphs(ImageClasses):
    """Few-shot tasks of random characters, 1x28x28, ink = 1 on 0.

    A fixed set of 400 / 60 / 160 characters by 20 drawers each, drawn in memory when first used.

    Args:
        split: train, validation or test.
        ways: classes per task.
        shots: support images per class.
        queries: query images per class.
        seed: the run's seed.
        rotations: turn each class of each task by its own multiple of 90 degrees.
        device: the device of the split's images, at most 6 MB, and of meta-batches.

    Raises:
        TypeError: an option has another type.
        ValueError: an option is out of range, or the device is not available.
    """

    def __init__(
        self,
        split: str,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        seed: int = 0,
        rotations: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        check_split(split)
        images = _universe()[split]
        super().__init__(
            images,
            torch.arange(CLASSES[split] + 1) * DRAWERS,
            split,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            rotations=rotations,
            device=device,
        )


@lru_cache(maxsize=1)
def _universe() -> dict[str, Tensor]:
    """The images of each split, (classes * DRAWERS, 1, SIDE, SIDE) uint8."""
    random = _Random(UNIVERSE_SEED)
    images = [_draw(_characters(random, CHUNK), random) for _ in range(sum(CLASSES.values()) // CHUNK)]
    return dict(zip(CLASSES, torch.cat(images).split([n * DRAWERS for n in CLASSES.values()]), strict=True))


def _draw(plan: _Strokes, random: _Random) -> Tensor:
    """Every drawer's image of every character, (n * DRAWERS, 1, SIDE, SIDE) uint8."""
    strokes = _by_hand(plan, random)
    return _render(_place(_pen_path(strokes), strokes.present, random), strokes.present, random)


class _Random:
    """Draws of one seeded generator, in float64 so that the pixels do not depend on a machine's rounding."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def normal(self, deviation: float, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * deviation

    def choice(self, values: tuple[float, ...], *shape: int) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64)
        return table[torch.randint(len(values), shape, generator=self.generator)]


class _Strokes(NamedTuple):
    """Pen strokes, each value (n, STROKES).

    Attributes:
        present: 1 for the strokes that a character has.
        x: horizontal start of the pen, unless `joined`.
        y: vertical start of the pen, unless `joined`.
        joined: the position on the previous stroke where this one starts, 0 to 1, or -1.
        heading: the pen's direction at time t in [0, 1] is heading + bend (t - 1/2) + swing sin(2 pi t).
        bend: the pen's direction at time t in [0, 1] is heading + bend (t - 1/2) + swing sin(2 pi t).
        swing: the pen's direction at time t in [0, 1] is heading + bend (t - 1/2) + swing sin(2 pi t).
        length: length of the path.
    """

    present: Tensor
    x: Tensor
    y: Tensor
    joined: Tensor
    heading: Tensor
    bend: Tensor
    swing: Tensor
    length: Tensor


def _characters(random: _Random, n: int) -> _Strokes:
    """The plans of n characters."""
    shape = (n, STROKES)
    strokes = random.choice((2, 2, 3, 3, 4), n, 1)
    sign = random.choice((-1, 1), *shape)
    return _Strokes(
        present=(torch.arange(STROKES) < strokes).double(),
        x=random.uniform(-0.5, 0.5, *shape),
        y=random.uniform(-0.5, 0.5, *shape),
        joined=random.choice((1, 1, 1, 0.5, 0, -1, -1), *shape),
        heading=(sign * random.choice((0.25, 0.5, 0.5, 0.5, 0.75), *shape) * math.pi).cumsum(1),
        bend=sign * random.choice((-1, 0, 0, 0, 0.8, 1.6, 3, 4.5, 6), *shape),
        swing=random.choice((0, 0, 0, 0, -1.2, 1.2), *shape),
        length=random.uniform(0.5, 1.2, *shape),
    )


def _by_hand(plan: _Strokes, random: _Random) -> _Strokes:
    """The strokes of each drawer: (n, STROKES) to (n * DRAWERS, STROKES)."""
    drawn = _Strokes(*(value.repeat_interleave(DRAWERS, 0) for value in plan))
    shape = drawn.x.shape
    return drawn._replace(
        x=drawn.x + random.normal(0.05, *shape),
        y=drawn.y + random.normal(0.05, *shape),
        heading=drawn.heading + random.normal(0.1, *shape),
        bend=drawn.bend * random.uniform(0.85, 1.15, *shape) + random.normal(0.15, *shape),
        swing=drawn.swing + random.normal(0.15, *shape),
        length=drawn.length * random.normal(0.12, *shape).exp(),
    )


def _pen_path(strokes: _Strokes) -> Tensor:
    """The positions of the pen, (n, STROKES, POINTS, 2); the points of a stroke are evenly spaced along it."""
    time = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    heading = (
        strokes.heading.unsqueeze(-1)
        + strokes.bend.unsqueeze(-1) * (time - 0.5)
        + strokes.swing.unsqueeze(-1) * torch.sin(2 * math.pi * time)
    )
    steps = torch.stack([heading.cos(), heading.sin()], -1) * (strokes.length / POINTS)[..., None, None]
    paths = steps.cumsum(2)
    start = torch.stack([strokes.x, strokes.y], -1)
    drawn = [start[:, :1] + paths[:, 0]]
    for stroke in range(1, STROKES):
        at = strokes.joined[:, stroke]
        index = (at.clamp(min=0) * (POINTS - 1)).long()
        touching = drawn[-1][torch.arange(len(index)), index]
        begin = torch.where((at >= 0).unsqueeze(-1), touching, start[:, stroke])
        drawn.append(begin.unsqueeze(1) + paths[:, stroke])
    return torch.stack(drawn, 1)


def _place(path: Tensor, present: Tensor, random: _Random) -> Tensor:
    """Slant, scale and shift each drawing at random onto the canvas [0, SIDE]^2."""
    n = len(path)
    slant = torch.eye(2, dtype=torch.float64) + random.normal(0.08, n, 2, 2)
    points = (path.flatten(1, 2) @ slant).view_as(path)
    absent = (present == 0)[..., None, None]
    low = points.masked_fill(absent, math.inf).amin((1, 2))
    high = points.masked_fill(absent, -math.inf).amax((1, 2))
    extent = (high - low).amax(1)
    size = (18 * random.normal(0.14, n).exp()).clamp(11, 24)
    points = (points - ((low + high) / 2)[:, None, None]) * (size / extent)[:, None, None, None]
    shift = random.uniform(-0.3, 0.3, n, 2) * (SIDE - 2 - size).unsqueeze(1)
    return points + SIDE / 2 + shift[:, None, None]


def _render(points: Tensor, present: Tensor, random: _Random) -> Tensor:
    """Render pen points with anti-aliasing.

    A Gaussian pen separates into rows and columns, so that all points of a drawing are one product of matrices.

    Args:
        points: (n, STROKES, POINTS, 2), positions of the pen.
        present: (n, STROKES), 1 for the strokes that a character has.
        random: draws the pen's width.

    Returns:
        The ink, (n, 1, SIDE, SIDE) uint8.
    """
    n = len(points)
    width = 0.55 * random.normal(0.1, n, 1, 1).exp()
    spacing = (points[:, :, 1] - points[:, :, 0]).norm(dim=-1) * present
    weight = spacing.repeat_interleave(POINTS, 1).unsqueeze(1) / (width * math.sqrt(2 * math.pi))
    centres = torch.arange(SIDE, dtype=torch.float64).unsqueeze(1) + 0.5
    columns, rows = (
        (centres - axis.flatten(1).unsqueeze(1)).div(width).square().mul(-0.5).exp() for axis in points.unbind(-1)
    )
    ink = (rows * weight) @ columns.mT
    return (ink * 1.5).clamp(0, 1).mul(255).round().to(torch.uint8).unsqueeze(1)
