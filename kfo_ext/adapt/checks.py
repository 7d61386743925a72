"""Checks of a learner's options, model, update and batches; each error names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.updates import Update


def check_function(argument: str, function: Any) -> None:
    """Raises TypeError for a loss or metric that cannot be called with (output, target)."""
    if function is not None and (not callable(function) or isinstance(function, type)):
        raise TypeError(f"{argument}: expected a function of (output, target) or None, got {function!r}")


def check_steps(steps: Any, least: int = 1) -> int:
    """The number of inner steps; raises ValueError unless it is an integer of at least `least`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"steps: expected an integer of at least {least}, got {steps!r}")
    return steps


def check_modules(model: nn.Module) -> None:
    """Raises RuntimeError for a module that would normalise by running statistics."""
    for name, module in model.named_modules():
        if not module.training and isinstance(getattr(module, "running_mean", None), Tensor):
            raise RuntimeError(
                f"{type(module).__name__} {name!r} would use running statistics, which mix tasks: "
                "build it with track_running_stats=False, or call train() on it"
            )


def check_alike(update: Update, like: Tensor) -> None:
    """Raises TypeError or ValueError unless the update's meta-parameters are as the model's parameters are now."""
    for row in update.phi[:1]:
        if row.dtype != like.dtype:
            raise TypeError(f"update: expected {like.dtype} as the parameters have, got {row.dtype}; use learner.to()")
        if row.device != like.device:
            raise ValueError(f"update: expected {like.device} as the parameters, got {row.device}; use learner.to()")


def check_phi(update: Update) -> None:
    """Raises TypeError or ValueError unless all meta-parameters are packed rows."""
    name, phi = type(update).__name__, update.phi
    if not isinstance(phi, tuple) or not all(isinstance(row, Tensor) for row in phi):
        raise TypeError(f"update: expected phi of {name} to be a tuple of tensors, got {type(phi).__name__}")
    for i, row in enumerate(phi):
        if row.dim() != 2 or len(row) != 1:
            raise ValueError(f"update: expected phi[{i}] of {name} to have shape (1, n), got {tuple(row.shape)}")


def check_update(update: Update, packing: Packing) -> None:
    """Raises ValueError unless the update was made for the adapted parameters, in their order."""
    check_phi(update)
    theirs = update.packing
    if len(theirs) != len(packing):
        raise ValueError(
            f"update: expected one made for {len(packing)} parameters, got one for {len(theirs)}"
            f"{_missing(theirs, packing)}; build it from the parameters that are adapted and require a gradient"
        )
    renamed = theirs.named and not _same_names(packing.names, theirs.names)
    for name, shape, other_name, other_shape in zip(packing.names, packing.shapes, theirs.names, theirs.shapes):
        if shape != other_shape or (renamed and name != other_name):
            raise ValueError(
                f"update: expected factors for parameter {name!r} of shape {tuple(shape)}, "
                f"got some made for {other_name!r} of shape {tuple(other_shape)}"
            )


def _same_names(mine: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether names agree, or would with the name of one module before all those of one side."""
    longer, shorter = (mine, theirs) if len(mine[0]) >= len(theirs[0]) else (theirs, mine)
    prefix = longer[0].removesuffix(shorter[0])
    return prefix[-1:] in ("", ".") and list(longer) == [prefix + name for name in shorter]


def _missing(theirs: Packing, packing: Packing) -> str:
    if not theirs.named:
        return f": the adapted parameters are {', '.join(packing.names)}"
    missing = [name for name in packing.names if name not in theirs.names]
    foreign = [name for name in theirs.names if name not in packing.names]
    return "".join(
        f"; {what}: {', '.join(names)}" for what, names in (("missing", missing), ("not adapted", foreign)) if names
    )


def check_batch(batch: TaskBatch) -> int:
    """The number of tasks of a batch; raises TypeError, ValueError or RuntimeError for an unsuitable one."""
    if not isinstance(batch, TaskBatch):
        raise TypeError(
            "batch: expected TaskBatch(Examples(x, y), Examples(x, y)) of kfo_ext.tasks, support and query, "
            f"each tensor (tasks, examples, ...), got {type(batch).__name__}"
        )
    tasks = check_examples("batch.support", batch.support)
    return check_examples("batch.query", batch.query, tasks)


def check_examples(argument: str, examples: Examples, expected: int | None = None) -> int:
    """The number of tasks of examples, `expected` if given; raises as `check_batch`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adaptation differentiates, which inference mode forbids: evaluate under torch.no_grad() instead"
        )
    if not isinstance(examples, Examples):
        raise TypeError(f"{argument}: expected Examples(x, y), got {type(examples).__name__}")
    tasks = -1 if expected is None else expected
    for field, tensor in zip(Examples._fields, examples):
        name = f"{argument}.{field}"
        if not isinstance(tensor, Tensor):
            hint = "torch.as_tensor converts an array; torch.stack joins tasks of one shape"
            raise TypeError(f"{name}: expected a tensor (tasks, examples, ...), got {type(tensor).__name__}; {hint}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
        tasks = tensor.shape[0] if tasks < 0 and tensor.dim() else tasks
        if tasks == 0:
            raise ValueError(f"{argument.partition('.')[0]}: expected at least one task, got none")
        if tensor.dim() < 2 or tensor.shape[0] != tasks:
            raise ValueError(
                f"{name}: expected ({tasks} tasks, examples, ...), got shape {tuple(tensor.shape)}; "
                "x[None] gives one task its dimension"
            )
    x, y = examples
    if 0 in (x.shape[1], y.shape[1]):
        raise ValueError(f"{argument}: expected at least one example of each task, got none")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{argument}.y: expected ({tasks} tasks, {x.shape[1]} examples, ...) as x has, got shape "
            f"{tuple(y.shape)} for x of shape {tuple(x.shape)}; is the dimension of tasks there?"
        )
    return tasks
