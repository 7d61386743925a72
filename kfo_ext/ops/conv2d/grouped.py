"""The convolution operators in torch's terms: each is one call for all tasks, a grouped convolution.

torch's own derivative of a grouped convolution's derivative is a loop over its groups, here the tasks. These operators
are each other's derivatives (see `kfo_ext.ops.conv2d.autograd`), so that there is a single call at any order.

Images are (tasks, images, height, width, channels), which torch's convolution reads without a copy if they lie in
memory as (images, tasks, channels, height, width), or with channels_last as (images, height, width, tasks, channels).
Results lie so, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kfo_ext.ops.torch_private import below_autograd_and_views

Kernel = Callable[..., Tensor]


def arranged(X: Tensor, channels_last: bool) -> Tensor:
    """Put images in the memory layout that these operators read without a copy.

    Args:
        X: (tasks, images, height, width, channels).
        channels_last: the memory format of torch's convolution.

    Returns:
        The same values and shape, in memory as the head of this module says.
    """
    if channels_last:
        return X.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4)
    return X.permute(1, 0, 4, 2, 3).contiguous().permute(1, 0, 3, 4, 2)


def laid_out(X: Tensor, like: Tensor) -> Tensor:
    """Put images in the memory layout of others.

    Args:
        X: (tasks, images, height, width, channels).
        like: other images; their last stride shows whether they are channels last.

    Returns:
        `arranged` images.
    """
    return arranged(X, like.stride(4) == 1)


def _channels(X: Tensor) -> Tensor:
    """(tasks, n, h, w, c) -> (n, tasks * c, h, w)."""
    images = X.permute(1, 0, 4, 2, 3).flatten(1, 2)
    if images.shape[2] == images.shape[3] == 1:
        # Strides of single pixels may look like channels last to torch, whose gradient by the weight then raises.
        return images.reshape(-1).view(images.shape)
    return images


def _tasks(images: Tensor, tasks: int) -> Tensor:
    """(n, tasks * c, h, w) -> (tasks, n, h, w, c)."""
    return images.unflatten(1, (tasks, -1)).permute(1, 0, 3, 4, 2)


def _one_call(op: str, X: Tensor, other: Tensor, stride: int, padding: int) -> tuple[int, list[list[int]]]:
    """The number of tasks, and stride, padding and dilation as torch takes them."""
    tasks = X.shape[0]
    if other.shape[0] != tasks:
        raise ValueError(f"{op}: expected operands of one number of tasks, got {tasks} and {other.shape[0]}")
    return tasks, [[stride] * 2, [padding] * 2, [1, 1]]


def _check_results(op: str, dy: Tensor, size: Sequence[int], kernel: Sequence[int], stride: int, padding: int) -> None:
    expected = [(n + 2 * padding - k) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    if list(dy.shape[2:4]) != expected:
        raise ValueError(f"{op}: dy has {list(dy.shape[2:4])} rows and columns, expected {expected}")


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of each task's images, as `kfo_ext.ops.conv2d.reference.conv2d`.

    Args:
        x: (tasks, images, height, width, in_channels).
        weight: (tasks, out_channels, in_channels, kernel_height, kernel_width).
        stride: of both axes.
        padding: of both axes.

    Returns:
        y: (tasks, images, out_height, out_width, out_channels).

    Raises:
        ValueError: the operands have different numbers of tasks.
    """
    tasks, fixed = _one_call("grouped_conv2d", x, weight, stride, padding)
    y = torch.ops.aten.convolution.default(_channels(x), weight.flatten(0, 1), None, *fixed, False, [0, 0], tasks)
    return _tasks(y, tasks)


def conv2d_input(dy: Tensor, weight: Tensor, size: Sequence[int], stride: int, padding: int) -> Tensor:
    """The gradient of <conv2d(x, weight), dy> by x: a transposed convolution.

    Args:
        dy: (tasks, images, out_height, out_width, out_channels).
        weight: (tasks, out_channels, in_channels, kernel_height, kernel_width).
        size: height and width of x.
        stride: of both axes.
        padding: of both axes.

    Returns:
        dx: (tasks, images, height, width, in_channels).

    Raises:
        ValueError: the operands have different numbers of tasks, or dy is not of the size that results from `size`.
    """
    tasks, fixed = _one_call("grouped_conv2d_input", dy, weight, stride, padding)
    _check_results("grouped_conv2d_input", dy, size, weight.shape[3:], stride, padding)
    # Rows and columns of the padded images that no tap reaches.
    unread = [(n + 2 * padding - k) % stride for n, k in zip(size, weight.shape[3:])]
    dx = torch.ops.aten.convolution.default(_channels(dy), weight.flatten(0, 1), None, *fixed, True, unread, tasks)
    return _tasks(dx, tasks)


def conv2d_weight(x: Tensor, dy: Tensor, kernel_size: Sequence[int], stride: int, padding: int) -> Tensor:
    """The gradient of <conv2d(x, weight), dy> by weight.

    Args:
        x: (tasks, images, height, width, in_channels).
        dy: (tasks, images, out_height, out_width, out_channels).
        kernel_size: height and width of the kernel.
        stride: of both axes.
        padding: of both axes.

    Returns:
        dweight: (tasks, out_channels, in_channels, kernel_height, kernel_width).

    Raises:
        ValueError: the operands have different numbers of tasks, or dy is not of the size that results from x.
    """
    tasks, fixed = _one_call("grouped_conv2d_weight", x, dy, stride, padding)
    _check_results("grouped_conv2d_weight", dy, x.shape[2:4], kernel_size, stride, padding)
    # Tells the size alone.
    weight = x.new_empty(tasks * dy.shape[4], x.shape[4], *kernel_size)
    dweight = torch.ops.aten.convolution_backward.default(
        _channels(dy), _channels(x), weight, None, *fixed, False, [0, 0], tasks, [False, True, False]
    )[1]
    return dweight.unflatten(0, (tasks, -1))


# The schemas of the operators.
OPERATORS: dict[str, Kernel] = {
    "grouped_conv2d(Tensor x, Tensor weight, int stride, int padding) -> Tensor": conv2d,
    "grouped_conv2d_input(Tensor dy, Tensor weight, int[] size, int stride, int padding) -> Tensor": conv2d_input,
    "grouped_conv2d_weight(Tensor x, Tensor dy, int[] kernel_size, int stride, int padding) -> Tensor": conv2d_weight,
}


def with_no_tasks(kernel: Kernel, empty: Kernel) -> Kernel:
    """Extend a kernel to no tasks: torch has no convolution without groups.

    Args:
        kernel: one of `OPERATORS`.
        empty: makes its result where there are no tasks.

    Returns:
        A function that calls one of the two.
    """

    @wraps(kernel)
    def either(*arguments: Any) -> Tensor:
        return (kernel if arguments[0].shape[0] else empty)(*arguments)

    return either


def of_its_own(kernel: Kernel) -> Kernel:
    """Hide from autograd that a kernel returns a view: a view from a Function may not be changed in place.

    Args:
        kernel: one of `OPERATORS`, or the result of `with_no_tasks`.

    Returns:
        A function with the same results, which autograd takes for no views.
    """

    @wraps(kernel)
    def below(*arguments: Any) -> Tensor:
        with below_autograd_and_views():
            return kernel(*arguments)

    return below
