"""Linear regression in one dimension, the tasks of the paper's analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from kfo_ext.tasks.batch import TaskBatch
from kfo_ext.tasks.checks import check_number
from kfo_ext.tasks.synthetic.points import Points


class Linear:
    """Tasks y = theta x + noise * n with theta, x and n standard normal numbers.

    Args:
        split: the name of the stream; the splits share the distribution but no draw.
        shots: support points per task.
        queries: query points per task.
        noise: standard deviation of the targets about the line; its square bounds the mean squared error from below.
        seed: the run's seed.

    Raises:
        TypeError: an option has another type.
        ValueError: the split is unknown, or an option is out of range.

    Source:
        the paper, section 4.1.
    """

    def __init__(self, split: str, *, shots: int = 10, queries: int = 10, noise: float = 1.0, seed: int = 0) -> None:
        self._points = Points(split, shots, queries, seed)
        self.noise = check_number("noise", noise, 0)

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`: x and y are (tasks, shots or queries, 1) float32."""
        generator = self._points.generator(index, tasks)

        def normal(points: int) -> Tensor:
            return torch.randn(tasks, points, 1, generator=generator, dtype=torch.float32)

        theta, x, n = normal(1), normal(self._points.each), normal(self._points.each)
        return self._points.batch(x, theta * x + self.noise * n)
