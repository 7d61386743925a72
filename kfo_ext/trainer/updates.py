"""The table of updates: options, and how each is built for parameters. Loads torch only when needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kfo_ext.choices import MOST_LAYERS

from .options import Option, Part

if TYPE_CHECKING:
    from torch import Tensor

    from kfo_ext.updates import Update


@dataclass(frozen=True, kw_only=True)
class LearnedUpdate(Part):
    """A row of `UPDATES`.

    Attributes:
        make: builds the update of (name, parameter) pairs, with its options as keywords. `adapt_update` is passed to
            the learner instead; `per_step` is passed as the number of inner steps, or None.
    """

    make: Callable[..., Update]


def of_class(name: str) -> Callable[..., Update]:
    """A function that builds an update of a class of `kfo_ext.updates`."""

    def make(parameters: Iterable[tuple[str, Tensor]], **options: Any) -> Update:
        return getattr(importlib.import_module("kfo_ext.updates"), name)(parameters, **options)

    return make


def _with_hidden_layers(before: Mapping[str, Any]) -> bool:
    return before["hidden_layers"] > 0


def _scale_has_effect(values: Mapping[str, Any]) -> None:
    if values["scale"] != 1 and values["hidden_layers"] == 0:
        raise ValueError(f"scale: has no effect without hidden_layers, expected 1, got {values['scale']}")


# For every update that may have its own rates for each inner step.
PER_STEP = {"per_step": Option(kind=bool, default=False, help="learn a rate for each parameter tensor and inner step")}
# For every update with meta-parameters that the inner loop can adapt.
ADAPTED = {"adapt_update": Option(kind=bool, default=True, help="adapt its meta-parameters too in the inner loop")}
# As in the paper.
NOT_ADAPTED = {"adapt_update": replace(ADAPTED["adapt_update"], default=False)}

UPDATES: dict[str, LearnedUpdate] = {
    "none": LearnedUpdate(help="plain gradient descent", make=of_class("GradientDescent"), options=PER_STEP),
    "meta_sgd": LearnedUpdate(help="a rate per element", make=of_class("MetaSGD"), options={**NOT_ADAPTED, **PER_STEP}),
    "meta_curvature": LearnedUpdate(help="a matrix per axis", make=of_class("MetaCurvature"), options=NOT_ADAPTED),
    "low_rank": LearnedUpdate(
        help="low-rank Cholesky",
        make=of_class("LowRank"),
        options={
            "rank": Option(kind=int, default=2, help="columns of the learned matrices", least=1),
            "whole_layer": Option(kind=bool, default=False, help="one matrix for a whole layer, not one per side"),
            **ADAPTED,
        },
    ),
    "kfo": LearnedUpdate(
        help="Kronecker-factored",
        make=of_class("KFO"),
        options={
            "psd": Option(kind=bool, default=True, help="use R^T R and L^T L in place of R and L"),
            "hidden_layers": Option(
                kind=int, default=0, help="hidden Kronecker layers; 0 is the linear update", least=0, most=MOST_LAYERS
            ),
            "scale": Option(
                kind=float, default=1.0, help="factor of gradients before the hidden layers' tanh", positive=True
            ),
            "bias": Option(
                kind=bool,
                default=_with_hidden_layers,
                shown="with hidden layers alone",
                help="add a learned bias to each update",
            ),
            "max_factor": Option(kind=int, default=None, help="longest side that gets a factor; none is any", least=1),
            **ADAPTED,
            **PER_STEP,
        },
        check=_scale_has_effect,
    ),
}
