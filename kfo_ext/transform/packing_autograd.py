"""Packing and unpacking, each the derivative of the other.

In torch's own the derivative of a concatenation is a slice for each tensor, and that of a slice a full row of zeros
around it: n tensors cost n rows each time that a derivative of packing is differentiated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.transform.autograd import pick, transformed

if TYPE_CHECKING:
    from kfo_ext.transform.packing import Packing


def plain() -> bool:
    """Whether torch's own operations are the better way: nothing to differentiate, or by rules that they alone have."""
    return not torch.is_grad_enabled() or transformed() or torch.compiler.is_compiling()


class Pack(Function):
    """Tensors, None for zeros, to one packed tensor; see `Packing.pack`."""

    @staticmethod
    def forward(ctx, packing: Packing, rows: int | None, *tensors: Tensor | None):
        ctx.set_materialize_grads(False)
        ctx.packing, ctx.batched = packing, rows is not None
        return packing.joined(tensors, rows)

    @staticmethod
    def backward(ctx, dpacked):
        if dpacked is None:
            return (None,) * (2 + len(ctx.packing))
        dtensors = ctx.packing.unpack(dpacked, batched=ctx.batched)
        return None, None, *map(pick, ctx.needs_input_grad[2:], dtensors)


class Unpack(Function):
    """One packed tensor to its tensors; see `Packing.unpack`."""

    @staticmethod
    def forward(ctx, packing: Packing, batched: bool, packed: Tensor):
        ctx.set_materialize_grads(False)
        ctx.packing, ctx.rows = packing, len(packed) if batched else None
        return tuple(packing.pieces(packed, batched))

    @staticmethod
    def backward(ctx, *dtensors: Tensor | None):
        if all(dtensor is None for dtensor in dtensors):
            return None, None, None
        return None, None, ctx.packing.join(dtensors, ctx.rows)
