"""The rules of the batch norm operators for torch.func.vmap; see `kfo_ext.ops.mapping`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kfo_ext.ops.mapping import Operand, Rule, alike, apart, apart_where

if TYPE_CHECKING:
    from kfo_ext.ops.batch_norm.autograd import BatchNormFamily


def rules(family: BatchNormFamily) -> tuple[Rule, Rule, Rule]:
    """The rules of a family of batch norm operators.

    Args:
        family: the operators, which the rules call with all examples folded into the tasks.

    Returns:
        A rule for each operator, in the order of the family.
    """

    def forward(
        examples: int, x: Operand, weight: Operand, bias: Operand, eps: float, relu: bool
    ) -> tuple[Tensor, ...]:
        tasks = x.shape[0]
        rows_weight, rows_bias = (alike(examples, tasks, False, X)[0] for X in (weight, bias))
        results = family.forward(x.folded(examples, tasks), rows_weight, rows_bias, eps, relu)
        return tuple(apart(Y, examples, tasks) for Y in results)

    def backward(
        examples: int,
        x: Operand,
        weight: Operand,
        bias: Operand,
        mean: Operand,
        rstd: Operand,
        dy: Operand,
        relu: bool,
        need: list[bool],
    ) -> tuple[Tensor, ...]:
        tasks = x.shape[0]
        rows_x, rows_mean, rows_rstd, rows_dy = (X.folded(examples, tasks) for X in (x, mean, rstd, dy))
        (rows_weight,) = alike(examples, tasks, need[1], weight)
        (rows_bias,) = alike(examples, tasks, need[2], bias)
        gradients = family.backward(rows_x, rows_weight, rows_bias, rows_mean, rows_rstd, rows_dy, relu, need)
        return apart_where(need, gradients, (x, weight, bias), examples, tasks)

    def double_backward(
        examples: int,
        x: Operand,
        weight: Operand,
        bias: Operand,
        mean: Operand,
        rstd: Operand,
        dy: Operand,
        ddx: Operand | None,
        ddweight: Operand | None,
        ddbias: Operand | None,
        relu: bool,
        need: list[bool],
    ) -> tuple[Tensor, ...]:
        tasks = x.shape[0]
        rows_x, rows_mean, rows_rstd, rows_dy = (X.folded(examples, tasks) for X in (x, mean, rstd, dy))
        rows_ddx = None if ddx is None else ddx.folded(examples, tasks)
        rows_weight, rows_ddweight = alike(examples, tasks, need[1], weight, ddweight)
        rows_bias, rows_ddbias = alike(examples, tasks, False, bias, ddbias)
        gradients = family.double_backward(
            rows_x, rows_weight, rows_bias, rows_mean, rows_rstd, rows_dy, rows_ddx, rows_ddweight, rows_ddbias,
            relu, need,
        )  # fmt: skip
        return apart_where(need, gradients, (x, weight, dy), examples, tasks)

    return forward, backward, double_backward
