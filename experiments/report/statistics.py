"""Means and 95 % intervals, over seeds and over tasks separately, of scores and of their paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..intervals import half_width

# The accuracies (n,) on the common list of tasks by seed, float64.
Scores = Mapping[int, Tensor]


class Summary(NamedTuple):
    """A mean over seeds and tasks.

    Attributes:
        mean: mean over all.
        seeds: half the 95 % interval over seeds of the means over tasks; None for fewer than two seeds.
        tasks: half the 95 % interval over tasks of the means over seeds; None for fewer than two tasks.
        n: number of seeds.
    """

    mean: float
    seeds: float | None
    tasks: float | None
    n: int

    @property
    def larger(self) -> float:
        """Half of the larger interval; 0 without any."""
        return max(self.seeds or 0.0, self.tasks or 0.0)


def summary(scores: Scores) -> Summary:
    """Summarize scores.

    Args:
        scores: accuracies by seed.

    Returns:
        Their mean and its intervals.

    Raises:
        ValueError: there is no seed, or numbers of tasks differ.
    """
    if not scores or len({len(values) for values in scores.values()}) != 1:
        raise ValueError(f"scores: expected seeds with one number of tasks, got {[len(v) for v in scores.values()]}")
    table = torch.stack([scores[seed].double() for seed in sorted(scores)])
    return Summary(float(table.mean()), half_width(table.mean(1)), half_width(table.mean(0)), len(table))


def difference(better: Sequence[Scores], worse: Sequence[Scores]) -> Scores:
    """Subtract the sum of the worse scores from that of the better ones, task by task.

    Args:
        better: the scores with a plus sign.
        worse: the scores with a minus sign.

    Returns:
        The differences for the seeds that all have.

    Raises:
        ValueError: numbers of tasks differ.
    """
    seeds = set.intersection(*(set(scores) for scores in (*better, *worse)))
    lengths = {len(scores[seed]) for scores in (*better, *worse) for seed in seeds}
    if len(lengths) > 1:
        raise ValueError(f"scores: expected those of the same tasks, got {sorted(lengths)} of them")
    return {seed: _sum(better, seed) - _sum(worse, seed) for seed in sorted(seeds)}


def _sum(parts: Sequence[Scores], seed: int) -> Tensor:
    return torch.stack([scores[seed].double() for scores in parts]).sum(0)
