"""The table of data sets: options, task family, and what the family asks of a network. No torch before it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import MACHINE, Option, Part

if TYPE_CHECKING:
    from kfo_ext.tasks import TaskFamily


@dataclass(frozen=True, kw_only=True)
class DataSet(Part):
    """A row of `DATASETS`.

    family: "module:class" of its `TaskFamily`. The class takes split, seed and the options by their names, and the
        device where `on_device` says so.
    renamed: options that the class knows by another name.
    on_device: whether the family keeps its examples on the run's device, and takes `device`.
    inputs: the shape of one example.
    network: the default one, by its name in `NETWORKS`.
    outputs: how many numbers a network gives for one example, or the name of the option that says it.
    loss: the name of a loss in torch.nn.functional.
    measure: what a validation selects by: accuracy (highest) or loss (lowest).
    """

    family: str
    inputs: tuple[int, ...]
    network: str
    outputs: int | str = "ways"
    renamed: Mapping[str, str] | None = None
    on_device: bool = True
    loss: str = "cross_entropy"
    measure: str = "accuracy"

    def build(self, split: str, *, seed: int, device: str, options: Mapping[str, Any]) -> TaskFamily:
        """The task family of one split.

        seed: of the stream of tasks.
        options: values of this data set's options.
        """
        module, name = self.family.split(":")
        names = self.renamed or {}
        arguments = {names.get(option, option): value for option, value in options.items()}
        if self.on_device:
            arguments["device"] = device
        return getattr(importlib.import_module(module), name)(split=split, seed=seed, **arguments)

    def outputs_of(self, options: Mapping[str, Any]) -> int:
        """How many numbers a network gives for one example under these options."""
        return options[self.outputs] if isinstance(self.outputs, str) else self.outputs


WAYS = {"ways": Option(kind=int, default=5, help="classes of a task", least=2)}
EXAMPLES = {
    "shots": Option(kind=int, default=5, help="support examples of a class", least=1),
    "queries": Option(kind=int, default=5, help="query examples of a class", least=1),
}
ROOT = {
    "data_root": Option(
        kind=str, default=None, help="folder of its archives", role=MACHINE, resumable=True, required=True
    )
}

DATASETS: dict[str, DataSet] = {
    "glyphs": DataSet(
        help="procedural characters, drawn in memory",
        family="kfo_ext.tasks:Glyphs",
        options={**WAYS, **EXAMPLES},
        inputs=(1, 28, 28),
        network="omniglot_cnn",
    ),
    "omniglot": DataSet(
        help="handwritten characters",
        family="kfo_ext.tasks:Omniglot",
        options={**ROOT, **WAYS, **EXAMPLES},
        renamed={"data_root": "root"},
        inputs=(1, 28, 28),
        network="omniglot_cnn",
    ),
    "sinusoid": DataSet(
        help="regression on sine waves",
        family="kfo_ext.tasks:Sinusoid",
        # Waves are drawn on the CPU, and small.
        on_device=False,
        options=EXAMPLES,
        inputs=(1,),
        outputs=1,
        loss="mse_loss",
        measure="loss",
        network="sinusoid_mlp",
        defaults={"fast_lr": 0.01},
    ),
}
