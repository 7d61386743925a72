"""The table of data sets: options, task family, and requirements on the network. Loads torch only when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from kfo_ext.choices import LARGEST_INTEGER
from kfo_ext.tasks import FAMILIES

from .options import MACHINE, SCORE, Option, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kfo_ext.tasks import FamilyOptions, TaskFamily

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataSet(Part):
    """A row of `DATASETS`.

    Attributes:
        make: builds the task family from split, seed, the options by name, and the device if `on_device` is set.
        inputs: the shape of one example, from the options.
        outputs: the number of outputs of a network per example, from the options.
        network: the default network, by its name in `NETWORKS`.
        on_device: whether the family keeps its examples on the run's device, and takes `device`.
        loss: the name of a loss in torch.nn.functional.
        measure: the measure that a validation selects by: accuracy (highest) or loss (lowest).
        metric: the metric of `MAML`.
    """

    make: Callable[..., TaskFamily]
    inputs: Callable[[Options], tuple[int, ...]]
    outputs: Callable[[Options], int]
    network: str
    on_device: bool = True
    loss: str = "cross_entropy"
    measure: str = "accuracy"
    metric: Callable[[Any, Tensor], Tensor] | None = None

    def build(self, split: str, *, seed: int, device: str, options: Options) -> TaskFamily:
        """Build the task family of one split.

        Args:
            split: train, validation or test.
            seed: of the stream of tasks.
            device: for the examples, if the family keeps them on a device.
            options: values of this data set's options.

        Returns:
            The family.
        """
        placed = {"device": device} if self.on_device else {}
        return self.make(split=split, seed=seed, **options, **placed)


def _sign_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return ((logits > 0) == (targets > 0.5)).float().mean()


# Loss, measure and metric of each kind of targets.
TARGETS: Mapping[str, dict[str, Any]] = {
    "classes": {"loss": "cross_entropy", "measure": "accuracy"},
    "binary": {"loss": "binary_cross_entropy_with_logits", "measure": "accuracy", "metric": _sign_accuracy},
    "values": {"loss": "mse_loss", "measure": "loss"},
}
# Options that the command line names differently from the family.
RENAMED = {"root": "data_root"}
# Options about the location of the data, which change no score.
PLACES = ("root", "cache", "download")


def of_family(name: str, network: str, **defaults: Any) -> DataSet:
    """Make the row of a task family of `kfo_ext.tasks`, with the family's own options.

    Args:
        name: in `FAMILIES`.
        network: the default network.
        defaults: new defaults of options that belong to something else.

    Returns:
        The row.
    """
    row = FAMILIES[name]
    hints = get_type_hints(row.options)

    def plain(options: Options) -> dict[str, Any]:
        return {item.name: options[RENAMED.get(item.name, item.name)] for item in fields(row.options)}

    def checked(options: Options) -> FamilyOptions:
        return row.options(**plain(options))

    def make(*, split: str, seed: int, device: torch.device | None = None, **options: Any) -> TaskFamily:
        try:
            return row.make(split=split, seed=seed, **plain(options), **({} if device is None else {"device": device}))
        except (ValueError, FileNotFoundError) as error:
            own, colon, rest = str(error).partition(":")
            if own not in RENAMED:
                raise
            raise type(error)(f"{RENAMED[own]}{colon}{rest}") from error

    return DataSet(
        help=row.help,
        options={
            RENAMED.get(item.name, item.name): Option(
                kind=next(kind for kind in (bool, int, float, str) if hints[item.name] in (kind, kind | None)),
                # An empty root means that it must be given.
                default=None if item.default == "" else item.default,
                required=item.default == "",
                help=item.metadata["help"],
                choices=item.metadata["choices"],
                least=item.metadata["least"],
                most=LARGEST_INTEGER,
                role=MACHINE if item.name in PLACES else SCORE,
                resumable=item.name in PLACES,
            )
            for item in fields(row.options)
        },
        make=make,
        inputs=lambda options: checked(options).input_shape,
        outputs=lambda options: checked(options).outputs,
        network=network,
        on_device=row.on_device,
        defaults=defaults,
        **TARGETS[row.options.targets],
    )


DATASETS: dict[str, DataSet] = {
    "glyphs": of_family("glyphs", "omniglot_cnn"),
    "omniglot": of_family("omniglot", "omniglot_cnn"),
    "cifar_fs": of_family("cifar_fs", "cifar_fs_cnn"),
    "csv_images": of_family("csv_images", "pooled_cnn"),
    "folders": of_family("folders", "pooled_cnn"),
    "sinusoid": of_family("sinusoid", "sinusoid_mlp", inner_lr=0.01),
    "linear": of_family("linear", "linear"),
    "logistic": of_family("logistic", "linear"),
}
