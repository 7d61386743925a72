"""The updates of the package, each with its equation in plain torch.

`test_update_laws.py` holds all of them to the laws of `Update`, `test_update_gradients.py` to the meta-gradients of
learners. A new update is one line in `UPDATES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from plain_maml import Rule, plain_kfo
from plain_updates import (
    plain_chain,
    plain_choice,
    plain_descent,
    plain_low_rank,
    plain_meta_curvature,
    plain_meta_sgd,
    with_rates,
)
from torch import Tensor

from kfo_ext import KFO, ByName, Chain, GradientDescent, LowRank, MetaCurvature, MetaSGD, Update

# Rectangular, of one to five dimensions, with equal neighbours that only their names tell apart.
SHAPES = {
    "conv.weight": (4, 3, 2, 3),
    "conv.bias": (4,),
    "wave.weight": (3, 2, 3),
    "volume.weight": (2, 3, 2, 1, 2),
    "body.weight": (5, 7),
    "body.bias": (5,),
    "head.0.weight": (3, 5),
    "head.1.weight": (3, 5),
    "head.1.bias": (3,),
}
STEPS = 3

U = TypeVar("U", bound=Update)


class Case(NamedTuple):
    """make: of (name, tensor) pairs, the update. plain: of the update, its equation for one task.

    An equation is of phi (1, n) each and gradients; where inner steps differ there is one for each.
    """

    make: Callable[[list[tuple[str, Tensor]]], Update]
    plain: Callable[[Update], Rule | Sequence[Rule]]

    def rule(self, update: Update, step: int | None) -> Rule:
        plain = self.plain(update)
        return plain if step is None else plain[step]


# The factors that parameters have: of the head alone, and none of a side longer than 4.
HEAD = {"head.0.weight": "RL", "head.1.weight": "RL", "head.1.bias": "RL"}
SHORT = {
    "conv.weight": "R",
    "conv.bias": "RL",
    "wave.weight": "RL",
    "volume.weight": "RL",
    "body.bias": "L",
    "head.0.weight": "R",
    "head.1.weight": "R",
    "head.1.bias": "RL",
}
BOTH = {name: side for name, side in SHORT.items() if name in HEAD}


def always(rule: Rule) -> Callable[[Update], Rule]:
    return lambda update: rule


def sided(sides: dict[str, str], **options) -> Callable[[Update], Rule]:
    return lambda update: plain_kfo(sides=[sides.get(name, "") for name in update.packing.names], **options)


def rated(rule: Rule) -> Callable[[Update], list[Rule]]:
    return lambda update: [with_rates(rule, step, STEPS) for step in range(STEPS)]


def low_rank(named: list[tuple[str, Tensor]], **options) -> LowRank:
    """With the same random start each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LowRank(named, rank=2, **options)


def by_name(named: list[tuple[str, Tensor]], **options) -> ByName:
    return ByName(named, {"*.bias": partial(MetaSGD, **options), "*": KFO})


def choice(bias: Rule) -> Callable[[Update], Rule]:
    """The equation of `by_name`; bias: with all of phi that are not KFO's two."""
    return lambda update: plain_choice(
        [0 if name.endswith("bias") else 1 for name in update.packing.names],
        (bias, len(update.phi) - 2),
        (plain_kfo(), 2),
    )


UPDATES: dict[str, Case] = {
    "gradient descent": Case(GradientDescent, always(plain_descent)),
    "gradient descent per step": Case(partial(GradientDescent, per_step=STEPS), rated(plain_descent)),
    "meta-sgd": Case(MetaSGD, always(plain_meta_sgd)),
    "meta-sgd per step": Case(partial(MetaSGD, per_step=STEPS), rated(plain_meta_sgd)),
    "meta-curvature": Case(MetaCurvature, always(plain_meta_curvature)),
    "low rank": Case(low_rank, lambda update: plain_low_rank(update.start, 2, False)),
    "low rank whole": Case(partial(low_rank, whole_layer=True), lambda update: plain_low_rank(update.start, 2, True)),
    "chain": Case(
        lambda named: Chain(MetaSGD(named), KFO(named, psd=False)),
        always(plain_chain((plain_meta_sgd, 1), (plain_kfo(psd=False), 2))),
    ),
    "chain per step": Case(
        lambda named: Chain(GradientDescent(named, per_step=STEPS), KFO(named, psd=False), MetaSGD(named)),
        lambda update: [
            plain_chain((with_rates(plain_descent, step, STEPS), 1), (plain_kfo(psd=False), 2), (plain_meta_sgd, 1))
            for step in range(STEPS)
        ],
    ),
    "by name": Case(by_name, choice(plain_meta_sgd)),
    "by name per step": Case(
        partial(by_name, per_step=STEPS),
        lambda update: [choice(with_rates(plain_meta_sgd, step, STEPS))(update) for step in range(STEPS)],
    ),
    "kfo": Case(partial(KFO, psd=False), always(plain_kfo(psd=False))),
    "kfo psd": Case(KFO, always(plain_kfo())),
    "kfo bias": Case(partial(KFO, bias=True), always(plain_kfo(bias=True))),
    "kfo hidden": Case(partial(KFO, hidden_layers=2), always(plain_kfo(bias=True, layers=3))),
    "kfo scale": Case(partial(KFO, hidden_layers=2, scale=5.0), always(plain_kfo(bias=True, layers=3, scale=5.0))),
    "kfo max_factor scale per step": Case(
        partial(KFO, max_factor=4, psd=False, bias=False, hidden_layers=1, scale=0.2, per_step=STEPS),
        lambda update: rated(sided(SHORT, psd=False, layers=2, scale=0.2)(update))(update),
    ),
    "kfo per step": Case(partial(KFO, per_step=STEPS), rated(plain_kfo())),
    "kfo only": Case(partial(KFO, only=["head.*"], bias=True), sided(HEAD, bias=True)),
    "kfo max_factor": Case(partial(KFO, max_factor=4, psd=False, bias=True), sided(SHORT, psd=False, bias=True)),
    "kfo max_factor psd": Case(partial(KFO, max_factor=4), sided(SHORT)),
    "kfo max_factor hidden": Case(partial(KFO, max_factor=4, hidden_layers=1), sided(SHORT, bias=True, layers=2)),
    "kfo only and max_factor": Case(
        partial(KFO, only=["head.*"], max_factor=4, hidden_layers=1), sided(BOTH, bias=True, layers=2)
    ),
}


def named_parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[tuple[str, Tensor]]:
    return [(name, torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()]


def random_phi(update: Update, rows: int = 1, scale: float = 0.3) -> tuple[Tensor, ...]:
    """Meta-parameters around the start, a row for each task; leaves."""
    return tuple(
        (row.detach() + scale * torch.randn(rows, row.shape[1], dtype=row.dtype)).requires_grad_() for row in update.phi
    )


def randomised(update: U) -> U:
    """The update, with other meta-parameters than at its start."""
    with torch.no_grad():
        for row, other in zip(update.phi, random_phi(update)):
            row.copy_(other)
    return update
