"""The table of updates: options, and how each is made for parameters. No torch before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kfo_ext.choices import MOST_LAYERS

from .options import Option, Part

if TYPE_CHECKING:
    from torch import Tensor

    from kfo_ext.updates import Update


@dataclass(frozen=True, kw_only=True)
class LearnedUpdate(Part):
    """A row of `UPDATES`.

    make: the update of (name, parameter) pairs, with this update's options as keywords but for `adapt_update`, which is
        the learner's.
    """

    make: Callable[..., Update]


def _gradient_descent(parameters: Iterable[tuple[str, Tensor]]) -> Update:
    from kfo_ext.updates import GradientDescent

    return GradientDescent(parameters)


def _kfo(parameters: Iterable[tuple[str, Tensor]], **options: Any) -> Update:
    from kfo_ext.updates import KFO

    return KFO(parameters, **options)


def _with_hidden_layers(before: Mapping[str, Any]) -> bool:
    return before["hidden_layers"] > 0


# Of every update with meta-parameters that the inner loop can adapt.
ADAPTED = {"adapt_update": Option(kind=bool, default=True, help="adapt its meta-parameters too in the inner loop")}

UPDATES: dict[str, LearnedUpdate] = {
    "none": LearnedUpdate(help="plain gradient descent", make=_gradient_descent),
    "kfo": LearnedUpdate(
        help="Kronecker-factored",
        make=_kfo,
        options={
            "psd": Option(kind=bool, default=True, help="use R^T R and L^T L in place of R and L"),
            "hidden_layers": Option(
                kind=int, default=0, help="hidden Kronecker layers; 0 is the linear update", least=0, most=MOST_LAYERS
            ),
            "bias": Option(
                kind=bool,
                default=_with_hidden_layers,
                shown="with hidden layers alone",
                help="add a learned bias to each update",
            ),
            "max_factor": Option(kind=int, default=None, help="longest side that gets a factor; none is any", least=1),
            **ADAPTED,
        },
    ),
}
