"""The updates of the package, each with its equation in plain torch: what `test_update_laws.py` holds all of them to.

A new update is one line in `UPDATES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from plain_maml import Rule, plain_kfo
from torch import Tensor

from kfo_ext import KFO, GradientDescent, Update

# Rectangular, with equal neighbours that only their names tell apart.
SHAPES = {
    "conv.weight": (4, 3, 2, 3),
    "conv.bias": (4,),
    "body.weight": (5, 7),
    "body.bias": (5,),
    "head.0.weight": (3, 5),
    "head.1.weight": (3, 5),
    "head.1.bias": (3,),
}


class Case(NamedTuple):
    """make: of (name, tensor) pairs, the update. plain: its equation for one task, of phi (1, n) each and gradients."""

    make: Callable[[list[tuple[str, Tensor]]], Update]
    plain: Rule


# The factors that each of SHAPES has: of the head alone, and none of a side longer than 4.
HEAD = ["", "", "", "", "RL", "RL", "RL"]
SHORT = ["R", "RL", "", "L", "R", "R", "RL"]
BOTH = ["", "", "", "", "R", "R", "RL"]

UPDATES: dict[str, Case] = {
    "gradient descent": Case(GradientDescent, lambda phi, gradients: gradients),
    "kfo": Case(partial(KFO, psd=False), plain_kfo(psd=False)),
    "kfo psd": Case(KFO, plain_kfo()),
    "kfo bias": Case(partial(KFO, bias=True), plain_kfo(bias=True)),
    "kfo hidden": Case(partial(KFO, hidden_layers=2), plain_kfo(bias=True, layers=3)),
    "kfo only": Case(partial(KFO, only=["head.*"], bias=True), plain_kfo(bias=True, sides=HEAD)),
    "kfo max_factor": Case(
        partial(KFO, max_factor=4, psd=False, bias=True), plain_kfo(psd=False, bias=True, sides=SHORT)
    ),
    "kfo max_factor psd": Case(partial(KFO, max_factor=4), plain_kfo(sides=SHORT)),
    "kfo max_factor hidden": Case(
        partial(KFO, max_factor=4, hidden_layers=1), plain_kfo(bias=True, layers=2, sides=SHORT)
    ),
    "kfo only and max_factor": Case(
        partial(KFO, only=["head.*"], max_factor=4, hidden_layers=1), plain_kfo(bias=True, layers=2, sides=BOTH)
    ),
}


def named_parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[tuple[str, Tensor]]:
    return [(name, torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()]


def random_phi(update: Update, rows: int = 1, scale: float = 0.3) -> tuple[Tensor, ...]:
    """Meta-parameters around the start, a row for each task; leaves."""
    return tuple(
        (row.detach() + scale * torch.randn(rows, row.shape[1], dtype=row.dtype)).requires_grad_() for row in update.phi
    )
