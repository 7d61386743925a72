"""A step of parameters: each minus lr times its part of a packed update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.ops.own_code import own_code
from kfo_ext.ops.parts import plain
from kfo_ext.ops.registration import pick
from kfo_ext.packing import Packing


@own_code
def moved(packing: Packing, params: Sequence[Tensor], U: Tensor, lr: float, rows: int | None) -> list[Tensor]:
    """Return the parameters after a step.

    Args:
        packing: names and shapes.
        params: in the packing's order, (*shape) each or (tasks, *shape).
        U: (tasks or 1, n), the packed update.
        lr: the inner learning rate.
        rows: the number of tasks, None without a task dimension.

    Returns:
        New tensors of the parameters' shapes.
    """
    if plain():
        return packing.unpack(packing.join(params, rows) - lr * U, batched=rows is not None)
    return list(_Moved.apply(packing, lr, rows, U, *params))


class _Moved(Function):
    """The parameters are not packed: their gradients are those of the result."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, lr: float, rows: int | None, U: Tensor, *params: Tensor):
        ctx.set_materialize_grads(False)
        ctx.packing, ctx.lr, ctx.rows = packing, lr, rows
        parts = packing.pieces(U, rows is not None)
        # Contiguous, whatever the parameters' memory format.
        return tuple(torch._foreach_sub([X.contiguous() for X in params], parts, alpha=lr))

    @staticmethod
    def backward(ctx: Any, *dparams: Tensor | None):
        need_U, need = ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        dU = None
        if need_U and any(dparam is not None for dparam in dparams):
            dU = ctx.packing.join(dparams, ctx.rows) * -ctx.lr
        return None, None, None, dU, *map(pick, need, dparams)
