"""The configuration of one meta-training run: frozen and self-checking.

A run selects one part from each of six tables: data set, network, method, update, optimizer, schedule. Each part has
its own options; the others, `RUN`, belong to every run. An option of a part that is not selected would have no effect,
and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfo_ext.runs.files import read_json, write_json

from .datasets import DATASETS, DataSet
from .methods import METHODS, Method
from .networks import NETWORKS, Network
from .optimizers import OPTIMIZERS, OuterOptimizer
from .options import SCORE, TRAINING, Option, Part
from .run_options import RUN
from .schedules import SCHEDULES, Schedule
from .updates import UPDATES, LearnedUpdate

if TYPE_CHECKING:
    import torch

# Each may set defaults of those after it, and of `RUN`; the later one takes precedence.
TABLES: Mapping[str, Mapping[str, Part]] = {
    "dataset": DATASETS,
    "network": NETWORKS,
    "method": METHODS,
    "update": UPDATES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
# The noun for a part of each table, for messages.
NOUNS = {
    "dataset": "data set",
    "network": "network",
    "method": "method",
    "update": "update",
    "optimizer": "optimizer",
    "schedule": "schedule",
}


def _network_of(before: Mapping[str, Any]) -> str:
    return DATASETS[before["dataset"]].network


# The values of these options are the names in the tables.
PARTS = {
    "dataset": Option(kind=str, default="glyphs", help="task family"),
    "network": Option(kind=str, default=_network_of, shown="that of the data set", help="what is meta-trained"),
    "method": Option(kind=str, default="maml", help="what the inner loop adapts"),
    "update": Option(kind=str, default="kfo", help="how it adapts"),
    "optimizer": Option(kind=str, default="adam", help="what applies the meta-gradients", role=TRAINING),
    "schedule": Option(kind=str, default="constant", help="of the outer learning rate", role=TRAINING),
}


@dataclass(frozen=True, init=False)
class Config:
    """Everything a run needs to be repeated; its options are those of `kfo train --help`, with underscores.

    Each option that has an effect is an attribute.

    Args:
        given: options by name; one that is not given takes the default of its data set, network, method or update.

    Attributes:
        values: all of them, by name.

    Raises:
        ValueError: an option is unknown or belongs to a part that is not selected, or a value is out of range.
        TypeError: a value has another type.
    """

    values: Mapping[str, Any] = field(hash=False)
    # `changed` starts from these, since another data set has other defaults.
    _given: Mapping[str, Any] = field(repr=False, compare=False)

    def __init__(self, **given: Any) -> None:
        object.__setattr__(self, "_given", given)
        object.__setattr__(self, "values", _resolved(given))
        self._check_device()
        self._check_parts()

    def __getattr__(self, name: str) -> Any:
        # Not through `self.values`: a copy under construction has none yet.
        values = vars(self).get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(_unknown(name, values) if values else name)

    def _check_parts(self) -> None:
        data, network, method = self.data_set, self.network_row, self.method_row
        shape = data.inputs(self.options_of(data))
        if not network.takes(shape):
            taken = ", ".join("any" if size is None else str(size) for size in network.inputs or ())
            raise ValueError(
                f"network: data set {self.dataset!r} has examples of shape {shape}, {self.network!r} takes ({taken})"
            )
        if method.head and not network.head:
            raise ValueError(f"method: {self.method!r} needs a network with a head, {self.network!r} has none")
        if self.precision == "tf32" and not network.convolutions:
            raise ValueError(f"precision: 'tf32' has no effect on network {self.network!r}, which has no convolution")
        for kind, table in TABLES.items():
            table[self.values[kind]].check(self.values)

    def _check_device(self) -> None:
        # Imported late: the help of the command line must not load torch.
        import torch

        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device: expected a device of torch such as 'cpu' or 'cuda:0', got {self.device!r}")
        here = f"has no effect on device {self.device!r}"
        if self.cuda_graph and kind == "cpu":
            raise ValueError(f"cuda_graph: expected a CUDA device, got {self.device!r}")
        if self.cuda_graph and self.checkpoint_inner:
            raise ValueError("cuda_graph: expected checkpoint_inner off: recomputed inner steps cannot be captured")
        if self.precision != "ieee" and self.dtype != "float32":
            raise ValueError(f"precision: {self.precision!r} has no effect on dtype {self.dtype!r}, expected 'float32'")
        if self.precision == "tf32" and kind == "cpu":
            raise ValueError(f"precision: 'tf32' {here}, expected a CUDA device or another precision")
        if self.values.get("channels_last") and kind == "cpu" and self.precision != "bf16":
            raise ValueError(f"channels_last: {here}, whose compiled convolution is channels-last already")

    @property
    def data_set(self) -> DataSet:
        """The row of `dataset` in its table."""
        return DATASETS[self.dataset]

    @property
    def network_row(self) -> Network:
        """The row of `network` in its table."""
        return NETWORKS[self.network]

    @property
    def method_row(self) -> Method:
        """The row of `method` in its table."""
        return METHODS[self.method]

    @property
    def update_row(self) -> LearnedUpdate:
        """The row of `update` in its table."""
        return UPDATES[self.update]

    @property
    def optimizer_row(self) -> OuterOptimizer:
        """The row of `optimizer` in its table."""
        return OPTIMIZERS[self.optimizer]

    @property
    def schedule_row(self) -> Schedule:
        """The row of `schedule` in its table."""
        return SCHEDULES[self.schedule]

    def options_of(self, part: Part) -> dict[str, Any]:
        """The values of the options that belong to a part."""
        return {name: self.values[name] for name in part.options}

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch.dtype."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def measure(self) -> str:
        """The measure that validation selects by: accuracy (highest), or for regression loss (lowest)."""
        return self.data_set.measure

    def changed(self, **changes: Any) -> Config:
        """Change some options; with another part, the options of the old one are dropped.

        Args:
            changes: the new values, by name.

        Returns:
            The new configuration.

        Raises:
            ValueError: as the constructor.
            TypeError: as the constructor.
        """
        return Config(**joined(self._given, changes))

    def to_dict(self) -> dict[str, Any]:
        """The options that have an effect, by name, as plain values."""
        return dict(self.values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """Build a configuration from plain values.

        Args:
            values: option name to value; absent ones take their defaults.
            source: the file or object to name in a message.

        Returns:
            The configuration.

        Raises:
            ValueError: a key is unknown, or a value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: expected an object of configuration values, got {type(values).__name__}")
        if unknown := [key for key in values if not isinstance(key, str)]:
            raise ValueError(f"{source}: unknown configuration key {unknown[0]!r}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read what `save` wrote.

        Args:
            path: the file to read.

        Returns:
            The configuration.

        Raises:
            ValueError: the file is not a valid configuration; the message names it.
        """
        return cls.from_dict(read_json(path), str(path))


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two sets of options; the second takes precedence, and options of a part that it replaces are dropped.

    Args:
        first: options by name.
        second: options by name.

    Returns:
        The merged options.

    Raises:
        ValueError: a part is in none of the tables.
    """
    both = {**first, **second}
    before, after = (options_in_effect(_parts(given)[0]) for given in (first, both))
    # An option that had no effect with the first either is kept, so that it is refused.
    return {name: value for name, value in both.items() if name in second or name in after or name not in before}


def options_in_effect(values: Mapping[str, Any]) -> dict[str, Option]:
    """The options that have an effect with the parts that `values` selects."""
    scored, trained = (
        {
            name: option
            for kind, table in TABLES.items()
            if (PARTS[kind].role == TRAINING) == training
            for name, option in table[values[kind]].options.items()
        }
        for training in (False, True)
    )
    # The training's options come last: their defaults may follow from the run's options.
    return {**PARTS, **scored, **RUN, **trained}


def owners(name: str) -> dict[str, dict[str, Option]]:
    """The parts that have an option: table to {part: the part's option}."""
    return {
        kind: found
        for kind, table in TABLES.items()
        if (found := {row: part.options[name] for row, part in table.items() if name in part.options})
    }


def difference(ours: Config, theirs: Config) -> str:
    """Name the options in which two configurations cannot belong to one run.

    Options that only one of them has follow from a part that differs.

    Args:
        ours: the run's configuration.
        theirs: the other one.

    Returns:
        The options with both values; '' if there are none.
    """
    fixed = [name for name, option in options_in_effect(ours.values).items() if not option.resumable]
    parts = [(name, ours.values[name], theirs.values[name]) for name in fixed if name in theirs.values]
    return ", ".join(f"{name}: expected {a!r}, got {b!r}" for name, a, b in parts if a != b)


def settings(config: Config) -> dict[str, Any]:
    """The options that determine the score of a checkpoint on given tasks."""
    known = options_in_effect(config.values)
    return {name: value for name, value in config.values.items() if known[name].role == SCORE}


def _parts(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The name of each table's part, and the defaults that these parts set."""
    values: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for kind, option in PARTS.items():
        table = TABLES[kind]
        values[kind] = _value(kind, option, given, defaults, values)
        if values[kind] not in table:
            others = [other for other, rows in TABLES.items() if values[kind] in rows]
            hint = f"it is a choice of {', '.join(others)}" if others else "if it is yours, run the script that adds it"
            raise ValueError(f"{kind}: expected one of {', '.join(table)}, got {values[kind]!r}; {hint}")
        defaults |= table[values[kind]].defaults
    return values, defaults


def _resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all options that have an effect."""
    values, defaults = _parts(given)
    known = options_in_effect(values)
    if foreign := [name for name in given if name not in known]:
        raise ValueError(_unknown(foreign[0], values))
    for name, option in known.items():
        values[name] = _value(name, option, given, defaults, values)
        if option.required and values[name] is None:
            kind = next(iter(owners(name)))
            raise ValueError(f"{name}: {NOUNS[kind]} {values[kind]!r} needs the {option.help}, got none")
    return values


def _value(
    name: str, option: Option, given: Mapping[str, Any], defaults: Mapping[str, Any], before: Mapping[str, Any]
) -> Any:
    default = None if callable(option.default) else option.default
    return option.value(name, given.get(name, defaults.get(name, default)), before)


def _unknown(name: str, values: Mapping[str, Any]) -> str:
    """The reason why there is no option of this name."""
    for kind, rows in owners(name).items():
        return f"{name}: has no effect with {kind} {values[kind]!r}; it is an option of {NOUNS[kind]} {', '.join(rows)}"
    known = {*PARTS, *RUN, *(each for table in TABLES.values() for part in table.values() for each in part.options)}
    near = get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(options_in_effect(values))}"
    return f"unknown configuration key {name!r}; {remedy}"
