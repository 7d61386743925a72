"""The table of outer optimizers: options, and torch's class of each. Loads torch only when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import TRAINING, Option, Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class OuterOptimizer(Part):
    """A row of `OPTIMIZERS`.

    Attributes:
        make: builds the optimizer of parameter groups, with its options as keywords. It must be one that `MetaStep`
            takes.
    """

    make: Callable[..., torch.optim.Optimizer]


def of_class(name: str, **fixed: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that builds a fused optimizer of a class of torch.optim.

    Args:
        name: of the class.
        fixed: keywords that are not options.

    Returns:
        The function, of parameter groups and options.
    """

    def make(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        from torch import optim

        return getattr(optim, name)(groups, fused=True, **fixed, **options)

    return make


def _check_nesterov(values: Mapping[str, Any]) -> None:
    if values["nesterov"] and not values["momentum"]:
        raise ValueError("nesterov: expected a momentum above 0 with it, got momentum 0")


def _decay(default: float, help: str) -> dict[str, Option]:
    return {"weight_decay": Option(kind=float, default=default, help=help, least=0, role=TRAINING)}


_L2 = "of all meta-learned parameters: this times the parameter is added to its meta-gradient, after clipping"
_DECOUPLED = "of all meta-learned parameters: each shrinks by this times the outer rate in a meta-iteration"

OPTIMIZERS: dict[str, OuterOptimizer] = {
    "adam": OuterOptimizer(
        help="Adam(0.9, 0.999)", make=of_class("Adam", betas=(0.9, 0.999)), options=_decay(0.0, _L2)
    ),
    "adamw": OuterOptimizer(
        help="the same with decoupled weight decay",
        make=of_class("AdamW", betas=(0.9, 0.999)),
        options=_decay(0.01, _DECOUPLED),
    ),
    "sgd": OuterOptimizer(
        help="stochastic gradient descent",
        make=of_class("SGD"),
        options={
            "momentum": Option(kind=float, default=0.0, help="of the meta-gradients", least=0, role=TRAINING),
            "nesterov": Option(kind=bool, default=False, help="Nesterov's momentum", role=TRAINING),
            **_decay(0.0, _L2),
        },
        check=_check_nesterov,
    ),
}
