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

# Limit in bytes for the largest tensor of several tasks on a CPU. glibc returns a larger block to the system as soon as
# it is free (its largest mmap threshold), and every page of the next one is zeroed again.
LARGEST_TENSOR = 32 << 20


class Route(Protocol):
    """A way to compute outputs from packed parameters, theta (tasks, n).

    Outputs are computed from the leaves of theta; the tasks' losses are differentiated with respect to these.
    """

    def leaves(self, theta: Tensor) -> list[Tensor]:
        """The tensors of theta to differentiate with respect to."""
        ...

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor | list[Any]:
        """The outputs of all tasks, or one per task; x: (tasks, n, ...)."""
        ...

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        """The gradients of the leaves as one (tasks, n) tensor."""
        ...

    def name(self, leaf: int) -> str:
        """The name of the parameter that a leaf holds."""
        ...

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """Finish after the last forward, with the inner loop's initial theta (1, n) and the parameters packed in it."""
        ...


def tasks_at_once(route: Route, x: Tensor, examples: int, row: int) -> int:
    """Return the number of tasks to compute in one graph.

    Args:
        route: the route of the forward.
        x: (tasks, n, ...), the examples of the plan.
        examples: the number of examples per task in the largest forward.
        row: bytes of the longest packed row of a task.

    Returns:
        On a CPU as many as keep the packed rows, and the largest activation of a planned forward, below
        `LARGEST_TENSOR`, at least 1; otherwise all of them.
    """
    if x.device.type != "cpu":
        return len(x)
    size = max(row, route.plan.largest * examples // max(1, x.shape[1]) if isinstance(route, Vmapped) else 0)
    return min(len(x), max(1, LARGEST_TENSOR // max(1, size)))


class Vmapped:
    """One forward of all tasks, made from the module's own: see `vmapped`.

    Args:
        module: the module to call.
        packing: the packing of theta; parameters that it does not hold are shared by all tasks.
        parameters: the module's own parameters, in the packing's order.

    Attributes:
        plan: the result of `planned`, from this call or an earlier one; set it before computing outputs.
    """

    plan: Plan

    def __init__(self, module: nn.Module, packing: Packing, parameters: Sequence[Tensor]) -> None:
        self.module, self.packing = module, packing
        self.slots = slots(module, parameters)

    def planned(self, theta: Tensor, x: Tensor) -> Plan:
        """The plan of this route, from the parameters and examples of one task, (1, ...) each."""
        return make_plan(self.module, self.call, self.packing.unpack(theta), x)

    def leaves(self, theta: Tensor) -> list[Tensor]:
        """One leaf per parameter, (tasks, *shape)."""
        return self.packing.unpack(theta)

    def call(self, pieces: Sequence[Tensor], x: Tensor) -> Any:
        """The module's output for one task, from its parameters in the packing's order."""
        return call_with(self.module, self.slots, pieces, x)

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> Tensor | list[Any]:
        """The outputs of all tasks, or one per task if they are no tensor."""
        outputs = mapped(self.module, self.call, self.plan)(list(leaves), x)
        if isinstance(outputs, Tensor):
            return outputs
        return [tree_map(lambda X, i=i: X[i], outputs) for i in range(len(x))]

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        """The gradients of the leaves as one (tasks, n) tensor."""
        return self.packing.join(gradients, tasks)

    def name(self, leaf: int) -> str:
        """The name of the parameter that a leaf holds."""
        return self.packing.names[leaf]

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """Do nothing: a mapped forward changes no parameter."""


class TaskByTask:
    """The module's own forward, one task after the other; arguments are as for `Vmapped`."""

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
        """One leaf per task and parameter, all parameters of the first task first."""
        if self.bounded:
            # A forward that scales in place must write to theta's own memory, where all tasks begin with one row.
            rows = [row.split(self.packing.sizes) for row in theta.unbind(0)]
            return [piece.view(shape) for row in rows for piece, shape in zip(row, self.packing.shapes)]
        return [piece for row in self.packing.rows(theta) for piece in row]

    def outputs(self, leaves: Sequence[Tensor], x: Tensor) -> list[Any]:
        """One output per task."""
        outputs = []
        for i, each in enumerate(x):
            row = list(leaves[i * len(self.packing) : (i + 1) * len(self.packing)])
            pieces = [row[index] for index in self.bounded]
            for index in self.bounded:
                # A view of theta must not be changed in place.
                row[index] = row[index].clone()
            for index in self.sparse:
                row[index] = _DenseGradient.apply(row[index])
            # Watching costs time for each function, and the first task shows what the others do.
            with _Watched() if i == 0 or self.weight_norm else nullcontext():
                outputs.append(call_with(self.module, self.slots, row, each))
            for piece, index in zip(pieces, self.bounded):
                # theta takes on the scaled values, as a separate tensor would; no graph has saved them.
                piece.data.copy_(row[index].data)
        return outputs

    def finish(self, theta: Tensor, parameters: Sequence[Tensor]) -> None:
        """Copy to the model's own parameters what forwards changed in place in theta (1, n)."""
        pieces = self.packing.unpack(theta.data, batched=False) if self.bounded else []
        for index in self.bounded:
            parameters[index].data.copy_(pieces[index])

    def packed(self, gradients: Sequence[Tensor], tasks: int) -> Tensor:
        """The gradients of the leaves as one (tasks, n) tensor."""
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).view(tasks, -1)

    def name(self, leaf: int) -> str:
        """The name of the parameter that a leaf holds."""
        return self.packing.names[leaf % len(self.packing)]


class _Watched(TorchFunctionMode):
    """Intercepts every function of torch in a forward: replaces weight norm by a composition, refuses checkpoints.

    The second derivative of torch's own weight norm (2.13, on the CPU) is wrong. A checkpoint in the forward recomputes
    in the backward pass, when the module holds its own parameters again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks != self.hooks and hooks[0].__module__ == checkpoint.__name__:
            raise RuntimeError(
                "model: its forward calls torch.utils.checkpoint, which would recompute with other parameters than the "
                "task's; remove it, and pass checkpoint=True to the learner"
            )
        return (COMPOSED[func] if func is torch._weight_norm else func)(*args, **(kwargs or {}))


# torch's parametrization, and the hook of its older form.
_WEIGHT_NORMS = ("_WeightNorm", "WeightNorm")


def _parts(module: nn.Module) -> Iterator[object]:
    for each in module.modules():
        yield each
        yield from each._forward_pre_hooks.values()


class _DenseGradient(torch.autograd.Function):
    """The identity, with a dense gradient: a packed row can hold no sparse one."""

    @staticmethod
    def forward(ctx, X):
        return X.view_as(X)

    @staticmethod
    def backward(ctx, dX):
        return dX.to_dense() if dX.is_sparse else dX
