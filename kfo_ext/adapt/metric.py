"""A number that judges each task's query outputs: the user's metric, or the accuracy of a classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# (output, target) -> a number for one task.
Metric = Callable[[Any, Tensor], Any]


@torch.no_grad()
def task_metrics(metric: Metric, outputs: Tensor | Sequence[Any], targets: Tensor, like: Tensor) -> Tensor:
    """Compute the metric of each task's output and target.

    Args:
        metric: maps (output, target) to a number for one task.
        outputs: of all tasks, or one output per task.
        targets: (tasks, n, ...).
        like: a tensor of the result's dtype and device.

    Returns:
        (tasks,), the metrics.

    Raises:
        TypeError: a value is neither a real number nor a real tensor of shape ().
        RuntimeError: the metric raised.
    """
    values = []
    for output, target in zip(outputs, targets, strict=True):
        try:
            value = metric(output, target)
        except Exception as error:
            raise RuntimeError(f"metric: raised {type(error).__name__}: {error}") from error
        tensor = isinstance(value, Tensor)
        if value.dim() != 0 or value.is_complex() if tensor else not isinstance(value, Real):
            got = f"{value.dtype} of shape {tuple(value.shape)}" if tensor else type(value).__name__
            raise TypeError(f"metric: expected a number or a tensor of shape () per task, got {got}")
        values.append(torch.as_tensor(value, dtype=like.dtype, device=like.device))
    return torch.stack(values)


@torch.no_grad()
def task_accuracies(outputs: Tensor | Sequence[Any], targets: Tensor, ignored: int) -> Tensor | None:
    """Compute the fraction of right classes per task.

    It is defined for integer targets (tasks, n, ...) and floating-point outputs (tasks, n, classes, ...) of at least
    two classes: the dimensions of torch's cross-entropy. The accuracy of a task is NaN if a target that is not ignored
    is no class or has a logit that is NaN, and if all its targets are ignored.

    Args:
        outputs: of all tasks, or one output per task.
        targets: (tasks, n, ...), classes.
        ignored: the target to ignore.

    Returns:
        (tasks,), the accuracies, or None where they are not defined.
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
    # In uint8, torch would wrap the ignored target to a class.
    targets = targets.long()
    counted = targets != ignored
    right = (outputs.argmax(2) == targets) & counted
    accuracy = right.flatten(1).sum(1) / counted.flatten(1).sum(1)
    # argmax takes a logit that is NaN for the largest.
    meaningless = ((targets < 0) | (targets >= outputs.shape[2]) | outputs.amax(2).isnan()) & counted
    return accuracy.masked_fill(meaningless.flatten(1).any(1), torch.nan)
