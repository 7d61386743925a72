"""The overhead of a call before any arithmetic: calls on tiny operands that require gradients, and the minimum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from kfo_ext.problems import Problems
from kfo_ext.testing import CASES, Operands, family_of, random_operands

# The target for a call of each order's operator, in microseconds.
HOST_US = {"forward": 12, "backward": 18, "double_backward": 22}
SHAPES = CASES["bias"]


class Empty(Function):
    """The cheapest differentiable call of three operands: it passes them on."""

    @staticmethod
    def forward(ctx, R, G, L):
        """G itself; saves the operands, as the operator does."""
        ctx.save_for_backward(R, G, L)
        return G.view_as(G)

    @staticmethod
    def backward(ctx, dY):
        """The saved operands, as gradients."""
        return ctx.saved_tensors


def leaves() -> Operands:
    """The operands of one small problem of one task, in float32, which require gradients."""
    return Operands(*(X.requires_grad_() for X in random_operands(SHAPES, 1, dtype=torch.float32)))


def operator_calls() -> dict[str, Callable[[], object]]:
    """A call of the compiled operator of each order, gradients on."""
    family, flat = family_of("native", "cpu"), Problems(SHAPES).flat
    R, G, L, dY, ddR, ddG, ddL, _ = leaves()
    return {
        "forward": lambda: family.transform(R, G, L, flat),
        "backward": lambda: family.backward(R, G, L, dY, flat, [True] * 3),
        "double_backward": lambda: family.double_backward(R, G, L, dY, ddR, ddG, ddL, flat, [True] * 4),
    }


def empty_call() -> Callable[[], Tensor]:
    """A call of `Empty`."""
    R, G, L, *_ = leaves()
    return lambda: Empty.apply(R, G, L)
