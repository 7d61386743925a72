"""The methods to compare, each as `kfo train` runs it; run as a program, it measures the memory of one."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.meta_case import QUERIES, SHOTS, WAYS
from bench.meta_memory import measure
from kfo_ext.trainer.config import Config
from kfo_ext.trainer.meta_step import MetaStep, make_adam
from kfo_ext.trainer.recipe import build_family, build_learner

BASE = "MAML"


class Case(NamedTuple):
    """A method.

    Attributes:
        options: options of `kfo train`.
        most: the target of its iteration's time, in iterations of MAML; None without a target.
    """

    options: dict[str, Any]
    most: float | None = None

    @property
    def command(self) -> str:
        """The command line of its training."""
        flags = []
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            flags.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
        return " ".join(["kfo train", *flags])


CASES = {
    BASE: Case({"method": "maml", "update": "none"}),
    "FOMAML": Case({"method": "maml", "update": "none", "first_order": True}),
    "ANIL": Case({"method": "anil", "update": "none"}),
    "BOIL": Case({"method": "boil", "update": "none"}),
    "rates per step": Case({"method": "maml", "update": "none", "per_step": True}),
    "Meta-SGD": Case({"method": "maml", "update": "meta_sgd"}, 1.3),
    "Meta-Curvature": Case({"method": "maml", "update": "meta_curvature"}, 1.3),
    "low-rank Cholesky": Case({"method": "maml", "update": "low_rank", "rank": 4}),
    "KFO, fixed factors": Case({"method": "maml", "update": "kfo", "adapt_update": False}),
    "KFO, adapted factors": Case({"method": "maml", "update": "kfo"}, 1.6),
    "KFO, two hidden layers": Case({"method": "maml", "update": "kfo", "hidden_layers": 2}),
    "T-Net": Case({"method": "tnet", "update": "none"}, 1.3),
    "LinNet": Case({"method": "linnet", "update": "none"}),
    "LinNet, ANIL": Case({"method": "anil_linnet", "update": "none"}),
}


def config_of(name: str, **settings: Any) -> Config:
    """Make the configuration of a case, on tasks of Omniglot's size.

    Args:
        name: a key of `CASES`.
        **settings: other options, such as steps.

    Returns:
        The configuration.
    """
    sizes = {"dataset": "glyphs", "network": "omniglot_cnn", "ways": WAYS, "shots": SHOTS, "queries": QUERIES}
    return Config(**{**sizes, **CASES[name].options, **settings})


def elements(config: Config) -> int:
    """The number of elements that the outer loop learns."""
    return sum(parameter.numel() for parameter in build_learner(config).parameters())


class Iteration:
    """A meta-iteration of `kfo train` at an outer rate of 0, so that every run starts from the same parameters."""

    def __init__(self, config: Config) -> None:
        learner = build_learner(config)
        self.step = MetaStep(learner, make_adam(learner.parameters(), 0.0))
        self.batch = build_family(config, "train", seed=0).sample(0, config.meta_batch)

    def run(self) -> Tensor:
        """The loss of one iteration."""
        return self.step(self.batch, 0.0).loss


def main() -> None:
    """Print the memory of the case in the first argument, as JSON."""
    what = json.loads(sys.argv[1])
    config = config_of(what.pop("name"), **what)
    print(json.dumps(measure(Iteration(config), torch.device(config.device))))


if __name__ == "__main__":
    main()
