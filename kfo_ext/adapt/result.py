"""The result of one meta-batch: losses, and a metric of each task."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What to change where a loss is not finite.
REMEDY = "lower the inner learning rate, lr (--inner-lr)"


class MetaResult(NamedTuple):
    """The losses and metrics of one meta-batch.

    Attributes:
        loss: (), the mean query loss over tasks after the last step; its backward gives the meta-gradients.
        support_losses: (steps, tasks), before each step, detached.
        query_losses: (tasks,), detached.
        metrics: (tasks,), the learner's `metric` of each task's query examples, detached; without one their accuracy,
            or None if outputs and targets have no classes (see `kfo_ext.adapt.metric.task_accuracies`).
    """

    loss: Tensor
    support_losses: Tensor
    query_losses: Tensor
    metrics: Tensor | None

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first step and task whose loss is not finite; a GPU is waited for."""
        losses = torch.cat([self.support_losses, self.query_losses[None]])
        bad = (~losses.isfinite()).nonzero()
        if len(bad) == 0:
            return
        step, task = bad[0].tolist()
        where = f"support loss of step {step + 1}" if step < len(losses) - 1 else "query loss"
        raise FloatingPointError(f"the {where} of task {task} is {losses[step, task].item()}: {REMEDY}")
