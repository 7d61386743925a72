"""Shared by the families of points: counts, a generator per meta-batch, support and query."""

from __future__ import annotations

import torch
from torch import Tensor

from kfo_ext.tasks.batch import Examples, TaskBatch, generator_for
from kfo_ext.tasks.checks import check_count, check_split


class Points:
    """The counts and generators of one stream of tasks, and the split into support and query.

    Args:
        split: the name of the stream; the splits share the distribution but no draw.
        shots: support points per task.
        queries: query points per task.
        seed: the run's seed.

    Raises:
        TypeError: a count is no integer.
        ValueError: the split is unknown, or a count is out of range.
    """

    def __init__(self, split: str, shots: int, queries: int, seed: int) -> None:
        self.split, self.seed = check_split(split), seed
        self.shots = check_count("shots", shots, 1)
        self.queries = check_count("queries", queries, 1)

    @property
    def each(self) -> int:
        """The number of points of a task."""
        return self.shots + self.queries

    def generator(self, index: int, tasks: int) -> torch.Generator:
        """The generator of the meta-batch number `index`."""
        check_count("index", index, 0)
        check_count("tasks", tasks, 1)
        return generator_for(self.seed, self.split, index)

    def batch(self, x: Tensor, y: Tensor) -> TaskBatch:
        """The first `shots` points of each task as support, the rest as query."""
        sizes = [self.shots, self.queries]
        support, query = (Examples(*parts) for parts in zip(x.split(sizes, 1), y.split(sizes, 1), strict=True))
        return TaskBatch(support, query)
