"""The rules of the three operators for torch.func.vmap; see `kfo_ext.ops.mapping`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kfo_ext.ops.mapping import Operand, Rule, alike, apart, apart_where

if TYPE_CHECKING:
    from kfo_ext.ops.transform.autograd import Family


def rules(family: Family) -> tuple[Rule, Rule, Rule]:
    """The rules of the operators of `family`, in its order."""

    def transform(
        examples: int, R: Operand, G: Operand, L: Operand, shapes: list[int], bias: Operand | None = None
    ) -> Tensor:
        tasks = G.shape[0]
        rows_R, rows_L, rows_bias = (alike(examples, tasks, False, X)[0] for X in (R, L, bias))
        Y = family.transform(rows_R, G.folded(examples, tasks), rows_L, shapes, rows_bias)
        return apart(Y, examples, tasks)

    def backward(
        examples: int, R: Operand, G: Operand, L: Operand, dY: Operand, shapes: list[int], need: list[bool]
    ) -> tuple[Tensor, ...]:
        tasks = G.shape[0]
        rows_R, rows_L = (alike(examples, tasks, needed, X)[0] for X, needed in ((R, need[0]), (L, need[2])))
        rows_G, rows_dY = (X.folded(examples, tasks) for X in (G, dY))
        gradients = family.backward(rows_R, rows_G, rows_L, rows_dY, shapes, need)
        return apart_where(need, gradients, (R, G, L), examples, tasks)

    def double_backward(
        examples: int,
        R: Operand,
        G: Operand,
        L: Operand,
        dY: Operand,
        ddR: Operand | None,
        ddG: Operand | None,
        ddL: Operand | None,
        shapes: list[int],
        need: list[bool],
    ) -> tuple[Tensor, ...]:
        tasks = G.shape[0]
        rows_R, rows_ddR = alike(examples, tasks, need[0], R, ddR)
        rows_L, rows_ddL = alike(examples, tasks, need[2], L, ddL)
        rows_G, rows_dY, rows_ddG = (None if X is None else X.folded(examples, tasks) for X in (G, dY, ddG))
        gradients = family.double_backward(rows_R, rows_G, rows_L, rows_dY, rows_ddR, rows_ddG, rows_ddL, shapes, need)
        return apart_where(need, gradients, (R, G, L, dY), examples, tasks)

    return transform, backward, double_backward
