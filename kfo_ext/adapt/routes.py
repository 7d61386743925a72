"""The ways to compute the outputs of all tasks: in one forward, or task by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from kfo_ext.packing import Packing

from .calls import call_with, slots
from .composed import COMPOSED
from .vmapped import Plan, make_plan, mapped

ROUTES = ("auto", "vmap", "loop")

# Bytes of the largest activation that one forward of several tasks makes on a CPU: a larger piece of memory goes back
# to the system as soon as it is free (glibc's largest mmap threshold), and every page of the next one is zeroed again.
LARGEST_ACTIVATION = 32 << 20


class Route(Protocol):
    """How outputs follow from packed parameters, theta (tasks, n).

    Outputs are computed from the leaves of theta, by which the losses of the tasks are differentiated.
    """

    def leaves(self, theta: Tensor) -> list[Tensor]: ...

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor | list[Any]:
        """Of all tasks, or one per task; x: (tasks, n, ...)."""
        ...

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        """Gradients by the leaves, as one (tasks, n) tensor."""
        ...

    def name(self, leaf: int) -> str:
        """The parameter that a leaf holds."""
        ...

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """After the last forward: theta (1, n) as the inner loop began with it, and the parameters packed in it."""
        ...


def tasks_at_once(route: Route, x: Tensor, examples: int) -> int:
    """How many of the tasks of a batch are to be in one forward, at least 1.

    On a CPU as many as keep the largest activation of a planned forward below `LARGEST_ACTIVATION`; else all of them.

    x: (tasks, n, ...), the examples of the plan.
    examples: of a task, in the largest forward.
    """
    if x.device.type != "cpu" or not isinstance(route, Vmapped):
        return len(x)
    size = route.plan.largest * examples // max(1, x.shape[1])
    return min(len(x), max(1, LARGEST_ACTIVATION // max(1, size)))


class Vmapped:
    """One forward of all tasks, made from the module's own: see `vmapped`.

    Args:
        module: what is called.
        packing: of the parameters that theta holds; the module's other parameters are as they are, in all tasks.
        parameters: the module's own, in the packing's order.

    Attributes:
        plan: from `planned`, of this call or an earlier one; to be set before outputs are computed.
    """

    plan: Plan

    def __init__(self, module: nn.Module, packing: Packing, parameters: Sequence[Tensor]) -> None:
        self.module, self.packing = module, packing
        self.slots = slots(module, parameters)

    def planned(self, theta: Tensor, x: Tensor) -> Plan:
        """The plan of this route, from the parameters and examples of one task, (1, ...) each."""
        return make_plan(self.module, self.call, self.packing.unpack(theta), x)

    def leaves(self, theta: Tensor) -> list[Tensor]:
        return self.packing.unpack(theta)

    def call(self, pieces: Sequence[Tensor], x: Tensor) -> Any:
        """The module's output for one task, from its parameters in the packing's order."""
        return call_with(self.module, self.slots, pieces, x)

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor | list[Any]:
        outputs = mapped(self.module, self.call, self.plan)(list(leaves), x)
        if isinstance(outputs, Tensor):
            return outputs
        return [tree_map(lambda X, i=i: X[i], outputs) for i in range(len(x))]

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        return self.packing.join(gradients, tasks)

    def name(self, leaf: int) -> str:
        return self.packing.names[leaf]

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        pass


class TaskByTask:
    """The module's own forward, for one task after the other; arguments are as for `Vmapped`."""

    def __init__(self, module: nn.Module, packing: Packing, parameters: Sequence[Tensor]) -> None:
        self.module, self.packing = module, packing
        self.slots = slots(module, parameters)
        self.weight_norm = any(type(each).__name__ in _WEIGHT_NORMS for each in _parts(module))
        # The parameters whose gradients are sparse, and those that the forward scales down in place.
        embeddings = [
            [owner for owner, _ in held if isinstance(owner, (nn.Embedding, nn.EmbeddingBag))] for held in self.slots
        ]
        self.sparse = [i for i, owners in enumerate(embeddings) if any(each.sparse for each in owners)]
        self.bounded = [i for i, owners in enumerate(embeddings) if any(each.max_norm is not None for each in owners)]

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
            # The first task shows what the others do, and each function that is watched costs time.
            with _Watched() if i == 0 or self.weight_norm else nullcontext():
                outputs.append(call_with(self.module, self.slots, row, each))
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


class _Watched(TorchFunctionMode):
    """Sees every function of torch in a forward: composes what torch differentiates wrongly, and refuses checkpoints.

    The second derivative of torch's own weight norm (2.13, on the CPU) is wrong. A checkpoint in the forward computes
    again in the backward pass, when the module holds its own parameters again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks != self.hooks and hooks[0].__module__ == checkpoint.__name__:
            raise RuntimeError(
                "model: its forward calls torch.utils.checkpoint, which would compute again with other parameters than "
                "the task's; take it out, and give the learner checkpoint=True"
            )
        return (COMPOSED[func] if func is torch._weight_norm else func)(*args, **(kwargs or {}))


# torch's parametrization, and the hook of its older form.
_WEIGHT_NORMS = ("_WeightNorm", "WeightNorm")


def _parts(module: nn.Module) -> Iterator[object]:
    for each in module.modules():
        yield each
        yield from each._forward_pre_hooks.values()


class _DenseGradient(torch.autograd.Function):
    """The tensor itself, with a gradient that is dense: a packed row holds no other."""

    @staticmethod
    def forward(ctx, X):
        return X.view_as(X)

    @staticmethod
    def backward(ctx, dX):
        return dX.to_dense() if dX.is_sparse else dX
