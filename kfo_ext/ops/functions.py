"""The functions of torch that our operators implement, and how their arguments are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS: dict[Callable, str] = {
    **dict.fromkeys((F.conv2d, torch.conv2d), "convolution"),
    F.batch_norm: "norm",
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), "relu"),
}


def single(value: Any) -> Any:
    """The number common to both axes, or the value itself."""
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and len(set(value)) == 1:
        return value[0]
    return value


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, also those in tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
