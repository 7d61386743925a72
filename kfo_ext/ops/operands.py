"""Requirements on operands, and the dtype to compute in: the same rules for all operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The dtypes of the kernels; half types are converted.
KERNEL_DTYPES = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
_STRIDED = torch.strided
# Devices with native kernels; torch.compile before 2.12 cannot trace a query for the devices with autocast.
AUTOCAST = ("cpu", "cuda")


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device of this type."""
    kind = device.type
    return kind in AUTOCAST and torch.is_autocast_enabled(kind)


def ready(operands: Sequence[object]) -> bool:
    """Check quickly for the usual call, for which `check_tensors` and `in_one_dtype` have nothing to do.

    Args:
        operands: the operands.

    Returns:
        Whether all are dense tensors of one dtype of the kernels, on one device, outside autocast.
    """
    first = operands[0]
    if not isinstance(first, Tensor):
        return False
    dtype, device = first.dtype, first.device
    # Most operands are on the CPU, and the name of a device is made anew at each access.
    if dtype not in KERNEL_DTYPES or (torch.is_autocast_enabled("cpu") if first.is_cpu else autocasts(device)):
        return False
    for operand in operands:
        if not isinstance(operand, Tensor) or operand.layout is not _STRIDED or operand.is_nested:
            return False
        if operand is not first and (operand.dtype is not dtype or operand.device != device):
            return False
    return True


def check_dense(name: str, operand: Tensor) -> None:
    """Raises TypeError for a tensor that is not dense: nested, sparse or quantized."""
    if operand.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one: call torch.stack or to_padded_tensor")
    if operand.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a dense tensor, got layout {operand.layout}: call to_dense()")
    if operand.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got a quantized one: call dequantize()")


def check_tensors(operands: dict[str, Tensor]) -> None:
    """Raises TypeError or ValueError unless all are dense floating-point tensors on the device of the first."""
    first, like = next(iter(operands.items()))
    for name, operand in operands.items():
        if not isinstance(operand, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(operand).__name__}")
        check_dense(name, operand)
        if not operand.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {operand.dtype}")
        if operand.dtype not in KERNEL_DTYPES + HALF:
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {operand.dtype}")
        if operand.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} as {first} has, got {operand.device}")


def check_dimensions(name: str, operand: Tensor, layout: Sequence[str]) -> None:
    """Raises ValueError unless the operand has the dimensions that `layout` names."""
    if operand.dim() != len(layout):
        expected = f"{len(layout)} dimensions ({', '.join(layout)})"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(operand.shape)}")


def in_one_dtype(compute: Callable[..., Tensor], operands: dict[str, Tensor]) -> Tensor:
    """Return compute(*operands), in float32 under autocast and for half types.

    Args:
        compute: the function.
        operands: its arguments by name.

    Returns:
        The result, converted back for half types.

    Raises:
        TypeError: operands have several dtypes outside autocast.
    """
    first, like = next(iter(operands.items()))
    if autocasts(like.device):
        wide = {name: X if X.dtype == torch.float64 else X.float() for name, X in operands.items()}
        with torch.autocast(like.device.type, enabled=False):
            return in_one_dtype(compute, wide)
    for name, operand in operands.items():
        if operand.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} as {first} has, got {operand.dtype}")
    if like.dtype in HALF:
        return compute(*(X.float() for X in operands.values())).to(like.dtype)
    return compute(*operands.values())
