"""Which backend a layer runs on, and in which dtype it computes: the same rules for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfo_ext.transform import native
from kfo_ext.transform.autograd import transformed
from kfo_ext.transform.op import AUTOCAST, HALF, why_not_native

BACKENDS = ("auto", "native", "reference")


def resolve(backend: str, device: torch.device, kernels: tuple[str, ...]) -> str:
    """What `backend` means on `device`: "auto" is native where its kernels are loaded, else reference.

    kernels: the types of device that the layer has kernels for

    Raises:
        ValueError: an unknown backend.
        RuntimeError: native, where its kernels are not loaded, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    there = device.type in kernels and native.available(device)
    if backend == "native" and not there:
        why = why_not_native(device.type) if device.type in kernels else f"it has kernels for {', '.join(kernels)}"
        raise RuntimeError(f"backend 'native' does not run on {device.type}: {why}")
    return "native" if there and backend != "reference" else "reference"


def check_tensors(operands: dict[str, Tensor], layout: tuple[str, ...]) -> None:
    """Raises TypeError or ValueError for an operand that is no floating-point tensor on the device of the first.

    layout: the names of the first's dimensions
    """
    first, like = next(iter(operands.items()))
    for name, operand in operands.items():
        if not isinstance(operand, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(operand).__name__}")
        if not operand.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {operand.dtype}")
        if operand.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} as {first} has, got {operand.device}")
    if like.dim() != len(layout):
        expected = f"{len(layout)} dimensions ({', '.join(layout)})"
        raise ValueError(f"{first}: expected {expected}, got shape {tuple(like.shape)}")


def in_one_dtype(compute: Callable[..., Tensor], operands: dict[str, Tensor]) -> Tensor:
    """compute(*operands), in float32 under autocast and, converted around it, for half types.

    Raises:
        TypeError: operands of several dtypes outside autocast.
    """
    first, like = next(iter(operands.items()))
    device = like.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        wide = {name: X if X.dtype == torch.float64 else X.float() for name, X in operands.items()}
        with torch.autocast(device, enabled=False):
            return in_one_dtype(compute, wide)
    for name, operand in operands.items():
        if operand.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} as {first} has, got {operand.dtype}")
    if like.dtype in HALF:
        return compute(*(X.float() for X in operands.values())).to(like.dtype)
    return compute(*operands.values())


def runs_plain_torch(backend: str, device: torch.device, kernels: tuple[str, ...]) -> bool:
    """Whether a layer runs its reference: see `resolve`; and always under torch.func and forward-mode AD."""
    return resolve(backend, device, kernels) == "reference" or transformed()
