"""Regression on sine waves, the smallest of the task families."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfo_ext.tasks.batch import TaskBatch
from kfo_ext.tasks.synthetic.points import Points


class Sinusoid:
    """Tasks y = A sin(x - b) with A uniform in [0.1, 5], b uniform in [0, pi] and x uniform in [-5, 5].

    Args:
        split: the name of the stream; the splits share the distribution but no draw.
        shots: support points per task.
        queries: query points per task.
        seed: the run's seed.

    Raises:
        TypeError: a count is no integer.
        ValueError: the split is unknown, or a count is out of range.

    Source:
        Finn, Abbeel and Levine 2017 (MAML), section 5.1.
    """

    def __init__(self, split: str, *, shots: int = 10, queries: int = 10, seed: int = 0) -> None:
        self._points = Points(split, shots, queries, seed)

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`: x and y are (tasks, shots or queries, 1) float32."""
        generator = self._points.generator(index, tasks)

        def uniform(low: float, high: float, points: int) -> Tensor:
            return torch.rand(tasks, points, 1, generator=generator, dtype=torch.float32) * (high - low) + low

        amplitude, phase = uniform(0.1, 5.0, 1), uniform(0.0, math.pi, 1)
        x = uniform(-5.0, 5.0, self._points.each)
        return self._points.batch(x, amplitude * torch.sin(x - phase))
