"""The convolution of each task's images in plain torch: right to any order, the ground truth of the kernels.

It is also what `conv2d` runs in forward mode, and under the other transforms that operators have no rules for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, channels_last: bool = False) -> Tensor:
    """The convolution of each task's images, as one convolution with a group of channels for each task.

    Args:
        x: (tasks, images, height, width, in_channels).
        weight: (tasks, out_channels, in_channels, kernel_height, kernel_width).
        stride: of both axes.
        padding: of both axes.
        channels_last: whether torch gets its operands in that memory format, else with each channel's pixels together.

    Returns:
        y: (tasks, images, out_height, out_width, out_channels).
    """
    tasks = x.shape[0]
    if channels_last:
        y = F.conv2d(
            x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2),
            weight.flatten(0, 1).contiguous(memory_format=torch.channels_last),
            stride=stride,
            padding=padding,
            groups=tasks,
        )
        return y.permute(0, 2, 3, 1).unflatten(3, (tasks, -1)).permute(3, 0, 1, 2, 4)
    images = x.permute(1, 0, 4, 2, 3).flatten(1, 2)
    if x.shape[2] == x.shape[3] == 1:
        # Strides of single pixels may look like channels last to torch, whose gradient by the weight then raises.
        images = images.reshape(-1).view(images.shape)
    y = F.conv2d(images, weight.flatten(0, 1), stride=stride, padding=padding, groups=tasks)
    return y.unflatten(1, (tasks, -1)).permute(1, 0, 3, 4, 2)
