"""The ways to compute the outputs of all tasks: in one forward, or task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kfo_ext.models import TasksForward
from kfo_ext.transform.packing import Packing

from .calls import embedding_slots, slots


class Route(Protocol):
    """How outputs follow from packed parameters, theta (tasks, n).

    Outputs are computed from the leaves of theta, by which the losses of the tasks are differentiated.
    """

    # Whether outputs come from `functional_call`, which changes the module meanwhile.
    swaps: bool

    def leaves(self, theta: Tensor) -> list[Tensor]: ...

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor | list[Any]:
        """Of all tasks, or one per task; x: (tasks, n, ...)."""
        ...

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        """Gradients by the leaves, as one (tasks, n) tensor."""
        ...

    def name(self, leaf: int) -> str:
        """The parameter, or the first one, that a leaf holds."""
        ...

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """After the last forward: theta (1, n) as the inner loop began with it, and the parameters packed in it."""
        ...


class AllAtOnce:
    """One forward of all tasks."""

    swaps = False

    def __init__(self, forward: TasksForward, packing: Packing) -> None:
        self.forward, self.packing = forward, packing

    def leaves(self, theta: Tensor) -> list[Tensor]:
        return [theta]

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.forward(dict(zip(self.packing.names, self.packing.unpack(leaves[0]))), x)

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        return gradients[0]

    def name(self, leaf: int) -> str:
        return self.packing.names[0]

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        pass


class TaskByTask:
    """The module's own forward, for one task after the other."""

    swaps = True

    def __init__(self, module: nn.Module, packing: Packing) -> None:
        self.module, self.packing = module, packing
        self.slots = slots(module, packing.names)
        sparse = embedding_slots(module, lambda embedding: embedding.sparse)
        bounded = embedding_slots(module, lambda embedding: embedding.max_norm is not None)
        # The parameters whose gradients are sparse, and those that the forward scales down in place.
        self.sparse = [i for i, held in enumerate(self.slots) if sparse.intersection(held)]
        self.bounded = [i for i, held in enumerate(self.slots) if bounded.intersection(held)]

    def leaves(self, theta: Tensor) -> list[Tensor]:
        if self.bounded:
            # What a forward scales must be in theta's own memory, where all tasks begin with one row.
            rows = [row.split(self.packing.sizes) for row in theta.unbind(0)]
            return [piece.view(shape) for row in rows for piece, shape in zip(row, self.packing.shapes)]
        return [piece for row in self.packing.rows(theta) for piece in row]

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> list[Any]:
        outputs = []
        for i, each in enumerate(x):
            row = list(leaves[i * len(self.packing) : (i + 1) * len(self.packing)])
            pieces = [row[index] for index in self.bounded]
            for index in self.bounded:
                # A view of theta must not be changed in place.
                row[index] = row[index].clone()
            for index in self.sparse:
                row[index] = _DenseGradient.apply(row[index])
            parameters = {slot: piece for held, piece in zip(self.slots, row) for slot in held}
            # The slots say all that is tied; by itself functional_call would enter a shared module twice.
            outputs.append(functional_call(self.module, parameters, (each,), tie_weights=False))
            for piece, index in zip(pieces, self.bounded):
                # theta goes on from the scaled values, as a tensor of its own would; no graph has saved them.
                piece.data.copy_(row[index].data)
        return outputs

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """Give the model's own parameters what the forward has made of theta (1, n) in place."""
        pieces = self.packing.unpack(theta.data, batched=False) if self.bounded else []
        for index in self.bounded:
            parameters[index].data.copy_(pieces[index])

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).view(tasks, -1)

    def name(self, leaf: int) -> str:
        return self.packing.names[leaf % len(self.packing)]


class _DenseGradient(torch.autograd.Function):
    """The tensor itself, with a gradient that is dense: a packed row holds no other."""

    @staticmethod
    def forward(ctx, X):
        return X.view_as(X)

    @staticmethod
    def backward(ctx, dX):
        return dX.to_dense() if dX.is_sparse else dX
