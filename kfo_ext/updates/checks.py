"""Checks of the arguments of updates; each error names the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfo_ext.ops.operands import HALF, KERNEL_DTYPES, autocasts
from kfo_ext.packing import NO_PARAMETERS, Packing, listed, name_parameters

if TYPE_CHECKING:
    from kfo_ext.updates.base import Update


def named_alike(parameters: Iterable[Any] | Packing) -> list[tuple[str, Tensor]]:
    """Check that parameters agree in dtype and device; meta-parameters take these from the first one.

    Args:
        parameters: tensors, or (name, tensor) pairs.

    Returns:
        (name, tensor) pairs.

    Raises:
        ValueError: there are no parameters, a name occurs twice, or devices are mixed.
        TypeError: the argument is not an iterable of tensors or pairs, or parameters are not floating point of one
            dtype.
    """
    if isinstance(parameters, Packing):
        raise TypeError(
            "parameters: expected tensors or (name, tensor) pairs, which give dtype and device of what is learned, "
            "got a Packing"
        )
    named = name_parameters(listed(parameters, "parameters", pairs=True))
    if not named:
        raise ValueError(NO_PARAMETERS)
    first_name, first = named[0]
    for name, tensor in named:
        if not tensor.is_floating_point():
            raise TypeError(f"parameter {name!r}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype not in KERNEL_DTYPES + HALF:
            raise TypeError(f"parameter {name!r}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"parameter {name!r}: expected {first.dtype} as {first_name!r} has, got {tensor.dtype}: "
                "convert the model to one dtype, or make an update for each"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"parameter {name!r}: expected device {first.device} as {first_name!r} has, got {tensor.device}"
            )
    return named


def check_count(argument: str, value: Any, meaning: str) -> int:
    """Check that a value is an integer of at least 1.

    Args:
        argument: name of the argument, for messages.
        value: the value.
        meaning: what it counts, for messages.

    Returns:
        The value.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the value is less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected {meaning}, an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected {meaning}, at least 1, got {value}")
    return value


def check_step(step: int | None, steps: int) -> int:
    """Check the inner step of an update that has meta-parameters for each of `steps` steps.

    Args:
        step: the inner step, 0 for the first.
        steps: the number of steps that have meta-parameters.

    Returns:
        The step.

    Raises:
        TypeError: the step is not an integer.
        ValueError: the step is None, or has no meta-parameters.
    """
    if step is None:
        raise ValueError(
            f"step: expected 0 to {steps - 1}, since this update has meta-parameters for each of {steps} inner steps, "
            "got None: pass step=... in a loop of your own"
        )
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: expected an integer, got {step!r}")
    if not 0 <= step < steps:
        raise ValueError(
            f"step: expected 0 to {steps - 1}, got {step}: this update has meta-parameters for {steps} inner steps; "
            "adapt by no more, or make it with a larger per_step"
        )
    return step


def check_rate(lr: Any) -> float:
    """The inner learning rate as a float; raises TypeError or ValueError unless it is a finite number of at least 0."""
    if isinstance(lr, bool) or not isinstance(lr, Real):
        learned = (
            "; learned rates are those of an update, such as MetaSGD or GradientDescent(..., per_step=steps)"
            if isinstance(lr, (Tensor, Iterable))
            else ""
        )
        raise TypeError(f"lr: expected a number, got {type(lr).__name__}{learned}")
    rate = float(lr)
    if not 0 <= rate < math.inf:
        raise ValueError(f"lr: expected a finite number of at least 0, got {lr!r}")
    return rate


def check_fits(lr: float, dtype: torch.dtype) -> None:
    """Raises ValueError for an inner learning rate beyond the largest number of the parameters' dtype."""
    largest = torch.finfo(dtype).max
    if lr > largest:
        raise ValueError(f"lr: expected at most {largest:.3g}, the largest number of {dtype}, got {lr!r}")


def check_adapted(adapt_update: bool, update: Update) -> None:
    """Raise ValueError if an update without meta-parameters is to be adapted."""
    if adapt_update and not update.phi:
        raise ValueError(
            f"adapt_update: expected an update to adapt, got {type(update).__name__}, which learns nothing"
        )


def check_like(phi: tuple[Tensor, ...], tensor: Tensor, argument: str) -> None:
    """Raise TypeError or ValueError unless a tensor has the dtype and device of the meta-parameters."""
    for row in phi[:1]:
        if tensor.dtype != row.dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(f"{argument}: expected {row.dtype} as the meta-parameters have, got {tensor.dtype}")
        if tensor.device != row.device:
            raise ValueError(f"{argument}: expected device {row.device} as the meta-parameters, got {tensor.device}")


def check_packed(update: str, phi: tuple[Tensor, ...], own: tuple[Tensor, ...], G: Tensor, columns: int) -> None:
    """Check the arguments of a rule in torch's own operations, which would broadcast shapes that do not fit.

    Args:
        update: its name, for messages.
        phi: the meta-parameters given.
        own: the update's own, (1, n) each.
        G: the gradients given.
        columns: the number of columns that G must have.

    Raises:
        ValueError: phi has another number of tensors; G or a tensor of phi has another shape.
        TypeError: there are several dtypes outside autocast.
    """
    check_number(update, phi, len(own))
    if G.dim() != 2 or G.shape[1] != columns:
        raise ValueError(f"G: expected shape (tasks, {columns}) for this {update}, got {tuple(G.shape)}")
    for i, (row, mine) in enumerate(zip(phi, own)):
        if row.dim() != 2 or row.shape[1] != mine.shape[1] or row.shape[0] not in (1, len(G)):
            raise ValueError(
                f"phi[{i}]: expected shape (1 or {len(G)} tasks, {mine.shape[1]}) for this {update}, "
                f"got {tuple(row.shape)}"
            )
        if row.dtype != G.dtype and not autocasts(G.device):
            raise TypeError(f"phi[{i}]: expected {G.dtype} as G has, got {row.dtype}")


def check_number(update: str, phi: tuple[Tensor, ...], expected: int) -> None:
    """Raise ValueError unless phi has the expected number of tensors."""
    if len(phi) != expected:
        raise ValueError(f"phi: expected {expected} tensors, as phi of this {update}, got {len(phi)}")


def check_rule(update: str, U: Any, G: Tensor) -> None:
    """Raise TypeError or ValueError unless U, the rule's result, holds one update for each gradient of G."""
    if not isinstance(U, Tensor):
        raise TypeError(f"rule: expected a tensor from the rule of {update}, got {type(U).__name__}")
    if U.shape != G.shape:
        raise ValueError(
            f"rule: expected shape {tuple(G.shape)}, as the gradients have, from the rule of {update}, "
            f"got {tuple(U.shape)}"
        )
