"""The rule of an operator for torch.func.vmap: the mapped dimension is folded into the task dimension.

A rule takes the number of mapped examples and the operator's arguments, each tensor as an `Operand`. It calls the
operator once, on operands that hold the tasks of all examples, (examples * tasks, ...), and returns results with the
examples in front. An operand that all examples share is not expanded if the operator accepts one row for all tasks,
unless each example needs its own derivative with respect to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfo_ext.ops.torch_private import add_batch_dim, below_vmap, innermost_level, unwrap_batched, vmap_level


class Operand(NamedTuple):
    """An operand of all examples, (tasks, ...) for each example.

    Attributes:
        X: the tensor.
        dim: the mapped dimension, None if all examples share the operand.
    """

    X: Tensor
    dim: int | None

    @property
    def mapped(self) -> bool:
        """Whether each example has its own operand."""
        return self.dim is not None

    @property
    def shape(self) -> torch.Size:
        """The shape for one example."""
        return self.X.shape if self.dim is None else self.X.shape[: self.dim] + self.X.shape[self.dim + 1 :]

    def of_each(self, examples: int) -> Tensor:
        """The operand as a view (examples, tasks, ...)."""
        if self.dim is None:
            return self.X.expand(examples, *self.X.shape)
        # An identity view would add a node to every derivative.
        return self.X if self.dim == 0 else self.X.movedim(self.dim, 0)

    def folded(self, examples: int, tasks: int) -> Tensor:
        """The operand as (examples * tasks, ...); one row for all tasks of an example is repeated."""
        X = self.of_each(examples)
        if X.shape[1] != tasks:
            X = X.expand(examples, tasks, *X.shape[2:])
        return X.reshape(examples * tasks, *X.shape[2:])


def alike(examples: int, tasks: int, need: bool, *operands: Operand | None) -> list[Tensor | None]:
    """Return operands with equal numbers of rows.

    Args:
        examples: the number of examples.
        tasks: the number of tasks.
        need: whether each example needs its own derivative with respect to the operands.
        *operands: operands with `tasks` rows or 1.

    Returns:
        The operands, folded if one is mapped or has several rows, or if `need`; otherwise unchanged, with one row for
        all tasks of all examples.
    """
    fold = need or any(X is not None and (X.mapped or X.shape[0] != 1) for X in operands)
    return [None if X is None else X.folded(examples, tasks) if fold else X.X for X in operands]


def apart(X: Tensor, examples: int, tasks: int, rows: int | None = None) -> Tensor:
    """(examples * tasks, ...) as (examples, tasks, ...); if rows is 1, summed over the tasks of each example."""
    X = X.reshape(examples, tasks, *X.shape[1:])
    return X if rows is None or rows == tasks else X.sum(1, keepdim=True)


def apart_where(
    need: Sequence[bool], gradients: Sequence[Tensor], operands: Sequence[Operand], examples: int, tasks: int
) -> tuple[Tensor, ...]:
    """`apart` of each gradient, with the rows of its operand; gradients that are not needed stay empty."""
    return tuple(
        apart(gradient, examples, tasks, X.shape[0]) if needed else gradient
        for gradient, X, needed in zip(gradients, operands, need, strict=True)
    )


# A function of the number of examples and the operator's arguments; results have the examples in front.
Rule = Callable[..., "Tensor | tuple[Tensor, ...]"]


def batching(overload: torch._ops.OpOverload, rule: Rule) -> Callable:
    """Make the kernel of an operator for vmap's dispatch key.

    Args:
        overload: the operator.
        rule: see the head of this file; results that its flags `need` exclude are empty and are returned unchanged.

    Returns:
        The kernel.
    """

    def kernel(*arguments: Any) -> Any:
        # A reference is kept, since the result of `vmap_level` points to it.
        innermost = innermost_level()
        level = vmap_level(innermost)
        number, examples = level.level(), level.batchSize()
        operands = [Operand(*unwrap_batched(X, number)) if isinstance(X, Tensor) else X for X in arguments]
        with below_vmap():
            if not any(isinstance(X, Operand) and X.mapped for X in operands):
                # It is mapped only on an outer level.
                return overload(*(X.X if isinstance(X, Operand) else X for X in operands))
            results = rule(examples, *operands)
        if isinstance(results, Tensor):
            return add_batch_dim(results, 0, number)
        return tuple(Y if Y.dim() == 1 else add_batch_dim(Y, 0, number) for Y in results)

    return kernel
