"""Regression on sine waves, the smallest of the task families."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfo_ext.tasks.batch import Examples, TaskBatch, check_count, check_split, generator_for


class Sinusoid:
    """Tasks y = A sin(x - b) with A uniform in [0.1, 5], b uniform in [0, pi] and x uniform in [-5, 5].

    split: the name of the stream; the splits share the distribution and no draw
    shots, queries: support and query points per task
    seed: the run's seed

    Raises: ValueError or TypeError for an unknown split or a count out of range.
    Source: Finn, Abbeel and Levine 2017 (MAML), section 5.1.
    """

    def __init__(self, split: str, *, shots: int = 10, queries: int = 10, seed: int = 0) -> None:
        self.split, self.seed = check_split(split), seed
        self.shots = check_count("shots", shots, 1)
        self.queries = check_count("queries", queries, 1)

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`: x and y are (tasks, shots or queries, 1) float32."""
        check_count("index", index, 0)
        check_count("tasks", tasks, 1)
        generator = generator_for(self.seed, self.split, index)

        def uniform(low: float, high: float, points: int) -> Tensor:
            return torch.rand(tasks, points, 1, generator=generator, dtype=torch.float32) * (high - low) + low

        amplitude, phase = uniform(0.1, 5.0, 1), uniform(0.0, math.pi, 1)
        x = uniform(-5.0, 5.0, self.shots + self.queries)
        y = amplitude * torch.sin(x - phase)
        support, query = (
            Examples(*parts)
            for parts in zip(
                x.split([self.shots, self.queries], 1), y.split([self.shots, self.queries], 1), strict=True
            )
        )
        return TaskBatch(support, query)
