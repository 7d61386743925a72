"""Errors of a model's forward that name the likely cause: a tensor of another dtype or device than the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from kfo_ext.tasks import Examples, TaskBatch

from .vmapped import Unserved


def named(argument: str, given: TaskBatch | Examples) -> dict[str, Tensor]:
    """The tensors of a batch or of examples by the names that messages give them."""
    if isinstance(given, TaskBatch):
        return named(f"{argument}.support", given.support) | named(f"{argument}.query", given.query)
    return {f"{argument}.{field}": tensor for field, tensor in zip(Examples._fields, given)}


@contextmanager
def named_errors(tensors: Mapping[str, Tensor], like: Tensor) -> Iterator[None]:
    """Replace an error of torch by the first mismatch between named tensors and parameters such as `like`."""
    try:
        yield
    except Unserved as unserved:
        raise RuntimeError(f"route: {unserved}; route='loop' serves it") from None
    except (RuntimeError, TypeError, ValueError) as error:
        if reason := _mismatch(tensors, like):
            raise TypeError(reason) from error
        raise


def _mismatch(tensors: Mapping[str, Tensor], like: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if tensor.device != like.device:
            return f"{name}: expected device {like.device} as the parameters have, got {tensor.device}"
        # Targets may have another dtype.
        if not name.endswith("y") and tensor.is_floating_point() and tensor.dtype != like.dtype:
            hint = f".to({like.dtype}) converts it"
            return f"{name}: expected {like.dtype} as the parameters have, got {tensor.dtype}; {hint}"
    return None
