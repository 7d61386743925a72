"""The rule of an operator for torch.func.vmap: the mapped dimension becomes part of the task dimension, nothing more.

A rule takes the number of mapped examples and the operator's arguments, each tensor as an `Operand`. It calls the
operator once, on operands that hold the tasks of all examples, (examples * tasks, ...), and gives the results back
with the examples in front. An operand that all examples share stays what it is where the operator takes one row for
all tasks, unless each example is to have a derivative of its own by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfo_ext.ops.torch_private import add_batch_dim, below_vmap, innermost_level, unwrap_batched, vmap_level


class Operand(NamedTuple):
    """An operand of all examples, (tasks, ...) for each of them; dim: the mapped dimension, None if they share it."""

    X: Tensor
    dim: int | None

    @property
    def mapped(self) -> bool:
        return self.dim is not None

    @property
    def shape(self) -> torch.Size:
        """That of one example."""
        return self.X.shape if self.dim is None else self.X.shape[: self.dim] + self.X.shape[self.dim + 1 :]

    def of_each(self, examples: int) -> Tensor:
        """(examples, tasks, ...), a view."""
        if self.dim is None:
            return self.X.expand(examples, *self.X.shape)
        # A view that changes nothing would still be a step of every derivative.
        return self.X if self.dim == 0 else self.X.movedim(self.dim, 0)

    def folded(self, examples: int, tasks: int) -> Tensor:
        """(examples * tasks, ...); one row for all tasks of an example becomes a row for each."""
        X = self.of_each(examples)
        if X.shape[1] != tasks:
            X = X.expand(examples, tasks, *X.shape[2:])
        return X.reshape(examples * tasks, *X.shape[2:])


def alike(examples: int, tasks: int, need: bool, *operands: Operand | None) -> list[Tensor | None]:
    """Operands with the same rows, tasks or 1: folded where one is mapped or the derivative of each example is needed.

    Otherwise they stay as they are where they have one row, which serves all tasks of all examples.
    """
    fold = need or any(X is not None and (X.mapped or X.shape[0] != 1) for X in operands)
    return [None if X is None else X.folded(examples, tasks) if fold else X.X for X in operands]


def apart(X: Tensor, examples: int, tasks: int, rows: int | None = None) -> Tensor:
    """(examples, tasks, ...) of (examples * tasks, ...), where rows is 1 their sum over the tasks of each example."""
    X = X.reshape(examples, tasks, *X.shape[1:])
    return X if rows is None or rows == tasks else X.sum(1, keepdim=True)


def apart_where(
    need: Sequence[bool], gradients: Sequence[Tensor], operands: Sequence[Operand], examples: int, tasks: int
) -> tuple[Tensor, ...]:
    """`apart` of each gradient, by an operand with as many rows; those that are not needed stay empty."""
    return tuple(
        apart(gradient, examples, tasks, X.shape[0]) if needed else gradient
        for gradient, X, needed in zip(gradients, operands, need, strict=True)
    )


# Of the number of examples and the operator's arguments; results have the examples in front.
Rule = Callable[..., "Tensor | tuple[Tensor, ...]"]


def batching(overload: torch._ops.OpOverload, rule: Rule) -> Callable:
    """The kernel of an operator under vmap's dispatch key.

    rule: see the head of this file; results that its flags `need` leave out are empty and stay as they are.
    """

    def kernel(*arguments: Any) -> Any:
        # Kept: what `vmap_level` makes of it points there.
        innermost = innermost_level()
        level = vmap_level(innermost)
        number, examples = level.level(), level.batchSize()
        operands = [Operand(*unwrap_batched(X, number)) if isinstance(X, Tensor) else X for X in arguments]
        with below_vmap():
            if not any(isinstance(X, Operand) and X.mapped for X in operands):
                # It is mapped further out alone.
                return overload(*(X.X if isinstance(X, Operand) else X for X in operands))
            results = rule(examples, *operands)
        if isinstance(results, Tensor):
            return add_batch_dim(results, 0, number)
        return tuple(Y if Y.dim() == 1 else add_batch_dim(Y, 0, number) for Y in results)

    return kernel
