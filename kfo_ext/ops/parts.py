"""Partition of the columns of packed rows: split into parts, and joined again in order."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.ops.registration import pick
from kfo_ext.ops.torch_private import transformed


def plain() -> bool:
    """Whether to use torch's own operations: without gradients, or under transforms for which only they have rules."""
    return not torch.is_grad_enabled() or transformed() or torch.compiler.is_compiling()


class Parts:
    """A partition of blocks of columns into parts.

    Adjacent blocks of one part form one run, and a single part is the packed tensor itself: nothing is copied in vain.

    Args:
        labels: the part of each block, in order.
        sizes: the columns of each block.
    """

    def __init__(self, labels: Sequence[Hashable], sizes: Sequence[int]) -> None:
        runs: list[tuple[Hashable, int]] = []
        for label, size in zip(labels, sizes, strict=True):
            if runs and runs[-1][0] == label:
                size += runs.pop()[1]
            runs.append((label, size))
        self.labels = tuple(dict.fromkeys(label for label, _ in runs))
        self._runs = [size for _, size in runs]
        # The positions of each part's runs.
        self._of = [[i for i, (label, _) in enumerate(runs) if label == mine] for mine in self.labels]

    def apart(self, packed: Tensor) -> dict[Hashable, Tensor]:
        """The columns of each part of (rows, n)."""
        if len(self.labels) == 1:
            return {self.labels[0]: packed}
        return dict(zip(self.labels, self.pieces(packed) if plain() else Apart.apply(self, packed)))

    def together(self, parts: Mapping[Hashable, Tensor]) -> Tensor:
        """The columns of all parts joined to (rows, n); the inverse of `apart`."""
        tensors = [parts[label] for label in self.labels]
        if len(tensors) == 1:
            return tensors[0]
        return self.joined(tensors) if plain() else Together.apply(self, *tensors)

    def pieces(self, packed: Tensor) -> tuple[Tensor, ...]:
        """`apart` in torch's own operations."""
        runs = packed.split(self._runs, dim=1)
        return tuple(runs[of[0]] if len(of) == 1 else torch.cat([runs[i] for i in of], dim=1) for of in self._of)

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """`together` in torch's own operations."""
        runs: dict[int, Tensor] = {}
        for of, tensor in zip(self._of, tensors):
            runs.update(zip(of, tensor.split([self._runs[i] for i in of], dim=1)))
        return torch.cat([runs[i] for i in range(len(runs))], dim=1)

    def filled(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The parts, with zeros for None; at least one is not None."""
        like = next(tensor for tensor in tensors if tensor is not None)
        return [
            like.new_zeros((like.shape[0], sum(self._runs[i] for i in of))) if tensor is None else tensor
            for of, tensor in zip(self._of, tensors)
        ]


# The second derivative of torch's split is a row of zeros for each run; these two are each other's derivative.
class Apart(Function):
    """One packed tensor to its parts; see `Parts.apart`."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, packed: Tensor) -> tuple[Tensor, ...]:
        """The parts of the packed tensor."""
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        return parts.pieces(packed)

    @staticmethod
    def backward(ctx: Any, *dtensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the packed tensor."""
        if all(dtensor is None for dtensor in dtensors):
            return None, None
        filled = ctx.parts.filled(dtensors)
        return None, ctx.parts.together(dict(zip(ctx.parts.labels, filled)))


class Together(Function):
    """The parts to one packed tensor; see `Parts.together`."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, *tensors: Tensor) -> Tensor:
        """The packed tensor."""
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        return parts.joined(tensors)

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the parts."""
        if dpacked is None:
            return (None,) * (1 + len(ctx.parts.labels))
        dtensors = ctx.parts.apart(dpacked).values()
        return None, *map(pick, ctx.needs_input_grad[1:], dtensors)
