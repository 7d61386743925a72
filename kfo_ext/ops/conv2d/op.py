"""`conv2d`: the images of each task with that task's weights, channels last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfo_ext.ops.conv2d import reference
from kfo_ext.ops.conv2d.autograd import CONV, GROUPED, ConvFamily
from kfo_ext.ops.conv2d.grouped import arranged
from kfo_ext.ops.dispatch import Operator
from kfo_ext.ops.operands import autocasts, check_dimensions
from kfo_ext.ops.torch_private import without_rules

# Without kernels, torch's convolution serves: a grouped one, with a group of channels for each task. Its own
# derivatives are loops over tasks from the second on; those of `GROUPED` are not. The CUDA kernels run for
# backend="native" only, until a GPU has shown which of the two is faster.
OPERATOR = Operator(("x", "weight"), {"native": CONV, "grouped": GROUPED}, ("cpu", "cuda"), by_name=("cuda",))
_MOST_PADDING = 1 << 60  # csrc/check_conv2d.h: padded sizes stay within 64 bits
_MOST_OF_TORCH = (1 << 31) - 1  # some of torch's kernels cut sizes to 32 bits


def _check(x: Tensor, weight: Tensor, stride: int, padding: int) -> None:
    check_dimensions("x", x, ("tasks", "images", "height", "width", "channels"))
    check_dimensions("weight", weight, ("tasks", "out channels", "in channels", "height", "width"))
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if padding > _MOST_PADDING:
        raise ValueError(f"padding: expected at most {_MOST_PADDING}, got {padding}")
    if x.shape[0] == 0:
        raise ValueError("x: expected at least one task, got none")
    if 0 in x.shape[2:]:
        raise ValueError(f"x: expected height, width and channels of at least 1, got shape {tuple(x.shape)}")
    if weight.shape[1] == 0:
        raise ValueError(f"weight: expected at least 1 out channel, got shape {tuple(weight.shape)}")
    for what, got, expected in (
        ("tasks", weight.shape[0], x.shape[0]),
        ("in channels", weight.shape[2], x.shape[4]),
    ):
        if got != expected:
            raise ValueError(f"weight: expected {expected} {what} as x has, got {got}")
    if any(k < 1 or n + 2 * padding < k for n, k in zip(x.shape[2:4], weight.shape[3:])):
        raise ValueError(
            f"weight: a kernel of {weight.shape[3]} x {weight.shape[4]} does not fit images of "
            f"{x.shape[2]} x {x.shape[3]} with padding {padding}"
        )


def _check_for_torch(reach: int, padding: int) -> None:
    if reach > _MOST_OF_TORCH:
        raise ValueError(
            f"padding: expected padded images of at most {_MOST_OF_TORCH} pixels a side for torch's convolution, "
            f"got {reach} with padding {padding}"
        )


def _in_autocasts_type(compute: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
    device = x.device.type
    if OPERATOR.resolve("auto", x.device) == "native" or without_rules():
        return compute(None, x, weight)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return compute(GROUPED, x.to(dtype), weight.to(dtype))


def conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    backend: str = "auto",
    channels_last: bool = False,
) -> Tensor:
    """The cross-correlation of each task's images with that task's weights, differentiable to any order.

    Args:
        x: (tasks, images, height, width, in_channels); other strides are copied.
        weight: (tasks, out_channels, in_channels, kernel_height, kernel_width).
        stride: of both axes.
        padding: zeros on each side of both axes.
        backend: "auto" (native on the CPU and grouped elsewhere; under autocast torch's convolution), "native"
            (compiled), "grouped" (one of torch's convolutions for all tasks, at every order of derivative) or
            "reference" (plain torch); under torch.func transforms and in forward mode as `kfo_ext.transform`.
        channels_last: where torch's convolution runs, give it operands in that memory format. The compiled one always
            computes channels last.

    Returns:
        y: (tasks, images, out_height, out_width, out_channels), out_height = (height + 2 padding - kernel_height) //
            stride + 1. Under autocast "auto" computes in autocast's type and returns that; float64 is left alone, as by
            torch. Otherwise half types, and everything under autocast, compute in float32.

    Raises:
        ValueError: sizes, numbers or devices that do not fit, no task, no channel, or an unknown backend.
        TypeError: operands that are no dense floating-point tensors or, outside autocast, of several dtypes.
        RuntimeError: the backend asked for does not run here.

    Source: paper, appendix D (the networks); torch.nn.functional.conv2d, for each task.
    """
    usual = OPERATOR.check((x, weight))
    _check(x, weight, stride, padding)
    reach = max(x.shape[2:4]) + 2 * padding
    # A stride beyond the padded image leaves one result, as that of its size does.
    stride = min(stride, reach)

    def compute(family: ConvFamily | None, x: Tensor, weight: Tensor) -> Tensor:
        if family is None:
            _check_for_torch(reach, padding)
            return reference.conv2d(x, weight, stride, padding, channels_last)
        if family is GROUPED:
            _check_for_torch(reach, padding)
            x = arranged(x, channels_last)
        return family.conv2d(x, weight, stride, padding)

    if backend == "auto" and autocasts(x.device) and torch.float64 not in (x.dtype, weight.dtype):
        return _in_autocasts_type(compute, x, weight)
    return OPERATOR.run(compute, (x, weight), backend, usual)
