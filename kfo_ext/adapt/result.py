"""What one meta-batch gives: losses, and accuracies where outputs and targets are those of a classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MetaResult(NamedTuple):
    """What one meta-batch gives.

    loss: (), the mean query loss over tasks after the last step; its backward gives the meta-gradients.
    support_losses: (steps, tasks), before each step, detached.
    query_losses: (tasks,), detached.
    accuracies: (tasks,), the query accuracy of each task where it has one (see `task_accuracies`), else None.
    """

    loss: Tensor
    support_losses: Tensor
    query_losses: Tensor
    accuracies: Tensor | None

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first step and task whose loss is not finite."""
        losses = torch.cat([self.support_losses, self.query_losses[None]])
        bad = (~losses.isfinite()).nonzero()
        if len(bad) == 0:
            return
        step, task = bad[0].tolist()
        where = f"support loss of step {step + 1}" if step < len(losses) - 1 else "query loss"
        raise FloatingPointError(f"the {where} of task {task} is {losses[step, task].item()}")


def task_accuracies(outputs: Tensor | Sequence[Any], targets: Tensor, ignored: int) -> Tensor | None:
    """The fraction of right classes per task, (tasks,), or None where there are no classes to compare.

    There is one for integer targets (tasks, n, ...) and floating-point outputs (tasks, n, classes, ...) of at least two
    classes: the dimensions of torch's cross-entropy. Ignored targets are left out. A task with any other target that is
    no class has accuracy NaN, and so has one whose targets are all ignored.

    outputs: of all tasks, or one output per task.
    ignored: the target to leave out.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return None
    if not isinstance(outputs, Tensor):
        if not all(isinstance(output, Tensor) and output.shape == outputs[0].shape for output in outputs):
            return None
        outputs = torch.stack(list(outputs))
    expected = (*targets.shape[:2], *targets.shape[2:])
    shape = (*outputs.shape[:2], *outputs.shape[3:])
    if not outputs.is_floating_point() or outputs.dim() < 3 or outputs.shape[2] < 2 or shape != expected:
        return None
    with torch.no_grad():
        counted = targets != ignored
        right = (outputs.argmax(2) == targets) & counted
        accuracy = right.flatten(1).sum(1) / counted.flatten(1).sum(1)
        foreign = ((targets < 0) | (targets >= outputs.shape[2])) & counted
        return accuracy.masked_fill(foreign.flatten(1).any(1), torch.nan)
