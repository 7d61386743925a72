"""What a learner accepts: its options, its model, its update and its batches, each refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.updates import Update


def check_rate(lr: Any) -> float:
    """The inner learning rate as a float."""
    if isinstance(lr, bool) or not isinstance(lr, Real):
        learned = (
            "; learned rates and rates per parameter are not supported" if isinstance(lr, (Tensor, Iterable)) else ""
        )
        raise TypeError(f"lr: expected a number, got {type(lr).__name__}{learned}")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr: expected a finite number of at least 0, got {lr!r}")
    return float(lr)


def check_steps(steps: Any, least: int = 1) -> int:
    """The number of inner steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"steps: expected an integer of at least {least}, got {steps!r}")
    return steps


def adapted_packing(module: nn.Module, allow_nograd: bool) -> Packing:
    """The packing of the parameters that the inner loop adapts."""
    parameters = dict(module.named_parameters())
    adapted = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    frozen = next((name for name in parameters if name not in adapted), None)
    if frozen is not None and not allow_nograd:
        raise ValueError(f"parameter {frozen!r} does not require a gradient; allow_nograd=True leaves it as it is")
    if not adapted:
        raise ValueError("model: expected at least one parameter that requires a gradient, got none")
    (first, like), *others = adapted.items()
    for name, parameter in others:
        if parameter.dtype != like.dtype:
            raise TypeError(
                f"model: expected parameters of one dtype, got {first!r} of {like.dtype} "
                f"and {name!r} of {parameter.dtype}"
            )
        if parameter.device != like.device:
            raise ValueError(
                f"model: expected parameters on one device, got {first!r} on {like.device} "
                f"and {name!r} on {parameter.device}"
            )
    return Packing.of(list(adapted.items()))


def check_structure(module: nn.Module, packing: Packing) -> list[Tensor]:
    """The adapted parameters as the module has them now, in the packing's order."""
    parameters = dict(module.named_parameters())
    again = "after the learner was built: build it again"
    for name, shape in zip(packing.names, packing.shapes):
        if name not in parameters:
            raise ValueError(f"parameter {name!r} was removed or renamed {again}")
        if not parameters[name].requires_grad:
            raise ValueError(f"parameter {name!r} was frozen {again}")
        if parameters[name].shape != shape:
            raise ValueError(
                f"parameter {name!r} had shape {tuple(shape)} and got {tuple(parameters[name].shape)} {again}"
            )
    known = set(packing.names)
    for name, parameter in parameters.items():
        if parameter.requires_grad and name not in known:
            raise ValueError(f"parameter {name!r} was added or made trainable {again}")
    return [parameters[name] for name in packing.names]


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


def check_update(update: Update, packing: Packing) -> None:
    """Raises ValueError unless the update was made for the adapted parameters, in their order."""
    theirs = update.packing
    if len(theirs) != len(packing):
        raise ValueError(
            f"update: expected one made for {len(packing)} parameters, got one for {len(theirs)}"
            f"{_missing(theirs, packing)}; make it of those that are adapted and require a gradient"
        )
    for name, shape, other_name, other_shape in zip(packing.names, packing.shapes, theirs.names, theirs.shapes):
        if shape != other_shape or (theirs.named and name != other_name):
            raise ValueError(
                f"update: expected factors for parameter {name!r} of shape {tuple(shape)}, "
                f"got some made for {other_name!r} of shape {tuple(other_shape)}"
            )


def _missing(theirs: Packing, packing: Packing) -> str:
    if not theirs.named:
        return f": the adapted parameters are {', '.join(packing.names)}"
    missing = [name for name in packing.names if name not in theirs.names]
    foreign = [name for name in theirs.names if name not in packing.names]
    return "".join(
        f"; {what}: {', '.join(names)}" for what, names in (("missing", missing), ("not adapted", foreign)) if names
    )


def check_batch(batch: TaskBatch) -> int:
    """The number of tasks of a batch."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adaptation differentiates, which inference mode forbids: evaluate under torch.no_grad() instead"
        )
    if not isinstance(batch, TaskBatch):
        raise TypeError(
            "batch: expected TaskBatch(Examples(x, y), Examples(x, y)) of kfo_ext.tasks, support and query, "
            f"each tensor (tasks, examples, ...), got {type(batch).__name__}"
        )
    tasks: int | None = None
    for part, examples in zip(TaskBatch._fields, batch):
        if not isinstance(examples, Examples):
            raise TypeError(f"batch.{part}: expected Examples(x, y), got {type(examples).__name__}")
        for field, tensor in zip(Examples._fields, examples):
            name = f"batch.{part}.{field}"
            if not isinstance(tensor, Tensor):
                hint = "torch.as_tensor converts an array; torch.stack joins tasks of one shape"
                raise TypeError(
                    f"{name}: expected a tensor (tasks, examples, ...), got {type(tensor).__name__}; {hint}"
                )
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
            tasks = tensor.shape[0] if tasks is None and tensor.dim() else tasks
            if tasks == 0:
                raise ValueError("batch: expected at least one task, got none")
            if tensor.dim() < 2 or tensor.shape[0] != tasks:
                raise ValueError(
                    f"{name}: expected ({tasks} tasks, examples, ...), got shape {tuple(tensor.shape)}; "
                    "x[None] gives one task its dimension"
                )
        x, y = examples
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"batch.{part}.y: expected ({tasks} tasks, {x.shape[1]} examples, ...) as x has, got shape "
                f"{tuple(y.shape)} for x of shape {tuple(x.shape)}; is the dimension of tasks there?"
            )
    return tasks


def foreign_tensor(batch: TaskBatch, like: Tensor) -> str | None:
    """What of the batch does not fit the parameters, `like` one of them: the likely reason of an error in a forward."""
    for part, examples in zip(TaskBatch._fields, batch):
        for field, tensor in zip(Examples._fields, examples):
            if tensor.device != like.device:
                return (
                    f"batch.{part}.{field}: expected device {like.device} as the parameters have, got {tensor.device}"
                )
        x = examples.x
        if x.is_floating_point() and x.dtype != like.dtype:
            return (
                f"batch.{part}.x: expected {like.dtype} as the parameters have, got {x.dtype}; "
                "batch.to(dtype=...) converts it"
            )
    return None
