"""The losses of all tasks; each equals the loss function's value for that task alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# (output, target) -> the loss of one task, ().
Loss = Callable[[Any, Tensor], Tensor]
# The target that torch's cross-entropy ignores by default, and the dtypes of classes that it accepts.
IGNORED = -100
CLASSES = (torch.int64, torch.uint8)


def task_losses(loss: Loss, outputs: Tensor | Sequence[Any], targets: Tensor) -> Tensor:
    """Compute the loss of each task's output and target.

    Args:
        loss: maps (output, target) to the loss of one task.
        outputs: of all tasks, or one output per task.
        targets: (tasks, n, ...).

    Returns:
        (tasks,), the losses.

    Raises:
        ValueError: a loss is no scalar; or torch's cross-entropy has a single class, for which it is 0 whatever the
            output, or on the CPU a target beyond the output's classes.
        TypeError: a loss is no tensor.
    """
    if loss is F.cross_entropy and isinstance(outputs, Tensor) and outputs.dim() == 3 and targets.dim() == 2:
        _check_classes(outputs[0])
        each = _cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        # A task's mean is over the targets that are not ignored, which in uint8 torch would wrap to a class.
        return each.sum(1) / (targets.long() != IGNORED).sum(1)
    losses = []
    for output, target in zip(outputs, targets, strict=True):
        if loss is F.cross_entropy and isinstance(output, Tensor):
            _check_classes(output)
            losses.append(_cross_entropy(output, target))
        else:
            losses.append(loss(output, target))
        if not isinstance(losses[-1], Tensor):
            raise TypeError(f"loss: expected a scalar tensor per task, got {type(losses[-1]).__name__}")
        if losses[-1].dim() != 0:
            raise ValueError(
                f"loss: expected a scalar per task, got shape {tuple(losses[-1].shape)}: average it, as a loss of "
                "torch does with reduction='mean'"
            )
    return torch.stack(losses)


def ignored_target(loss: Loss | None) -> int:
    """The target that the loss ignores: its `ignore_index` if it has one, else that of cross-entropy."""
    if isinstance(loss, partial):
        return loss.keywords.get("ignore_index", ignored_target(loss.func))
    index = getattr(loss, "ignore_index", IGNORED)
    return index if isinstance(index, int) else IGNORED


def _cross_entropy(output: Tensor, target: Tensor, **options: Any) -> Tensor:
    try:
        return F.cross_entropy(output, target, **options)
    except IndexError as error:
        raise ValueError(
            f"loss: cross-entropy of an output of shape {tuple(output.shape)}: {error}; expected targets below the "
            "number of outputs, so make the network with one output per class (ways)"
        ) from None


def _check_classes(output: Tensor) -> None:
    if output.dim() > 1 and output.shape[1] == 1:
        raise ValueError(
            "loss: cross-entropy over a single class is 0 for any output, got an output of shape "
            f"{tuple(output.shape)}; pass another loss, such as mse_loss or binary_cross_entropy_with_logits"
        )
