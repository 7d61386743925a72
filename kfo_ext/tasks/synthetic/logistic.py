"""Binary logistic regression in any dimension, the tasks of the paper's appendix B.1."""

from __future__ import annotations

import torch

from kfo_ext.tasks.batch import TaskBatch
from kfo_ext.tasks.checks import check_choice, check_count
from kfo_ext.tasks.options import LABELS
from kfo_ext.tasks.synthetic.points import Points


class Logistic:
    """Two-class tasks with a linear boundary: theta and x are standard normal vectors.

    Args:
        split: the name of the stream; the splits share the distribution but no draw.
        shots: support points per task, of both classes together.
        queries: query points per task, of both classes together.
        dimension: dimension of theta and x.
        labels: separable gives 1[theta^T x > 0]; bernoulli draws 1 with probability sigma(theta^T x). In two dimensions
            no classifier is right on more than 69.3 % of these points.
        seed: the run's seed.

    Raises:
        TypeError: an option has another type.
        ValueError: the split or the labels are unknown, or an option is out of range.

    Source:
        the paper, appendix B.1. Its figure needs separable labels, its text says bernoulli.
    """

    def __init__(
        self,
        split: str,
        *,
        shots: int = 10,
        queries: int = 10,
        dimension: int = 2,
        labels: str = "separable",
        seed: int = 0,
    ) -> None:
        self._points = Points(split, shots, queries, seed)
        self.dimension = check_count("dimension", dimension, 1)
        self.labels = check_choice("labels", labels, LABELS)

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """Make one meta-batch.

        Args:
            index: the number of the meta-batch.
            tasks: the number of tasks.

        Returns:
            x (tasks, n, dimension) and y (tasks, n, 1) of 0 and 1, both float32; y fits
            binary_cross_entropy_with_logits for a network with one logit.
        """
        generator = self._points.generator(index, tasks)
        theta = torch.randn(tasks, self.dimension, 1, generator=generator, dtype=torch.float32)
        x = torch.randn(tasks, self._points.each, self.dimension, generator=generator, dtype=torch.float32)
        # In float64, so that no label depends on a machine's rounding.
        logits = x.double() @ theta.double()
        if self.labels == "separable":
            y = logits > 0
        else:
            y = torch.rand(logits.shape, generator=generator, dtype=torch.float64) < logits.sigmoid()
        return self._points.batch(x, y.to(torch.float32))
