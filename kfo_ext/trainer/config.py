"""What one meta-training run computes: a frozen configuration that checks itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from kfo_ext.choices import DATASETS, INITS, LARGEST_INTEGER, MOST_LAYERS, MOST_THREADS, PRECISIONS
from kfo_ext.runs.files import is_number, read_json, write_json

if TYPE_CHECKING:
    import torch

METHODS = ("maml", "anil")
UPDATES = ("none", "kfo")
DTYPES = ("float32", "float64")

# What may differ between the parts of one run: none of these changes what a given iteration computes, but that another
# number of threads rounds torch's own sums differently.
RESUMABLE = ("iterations", "data_root", "workers", "threads", "cuda_graph")

# What cannot change the score of a given checkpoint on given tasks, but for rounding. Every other field is a setting of
# an evaluation.
UNSCORED = (
    *RESUMABLE,
    *("init", "first_order", "checkpoint_inner", "meta_lr", "meta_lr_half_life", "clip_norm", "meta_batch", "seed"),
    *("validation_every", "validation_tasks", "patience", "device", "channels_last"),
)


def _field(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: int | None = None,
    most: int = LARGEST_INTEGER,
    positive: bool = False,
):
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "positive": positive}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run needs to be repeated; the fields' help texts are those of `kfo train --help`.

    Raises: ValueError or TypeError naming the field, what it expects and what it got.
    """

    dataset: str = _field("glyphs", "task family", choices=DATASETS)
    data_root: str | None = _field(None, "folder that holds the archives of the data set (omniglot)")
    method: str = _field("maml", "adapt all parameters, or the head only", choices=METHODS)
    update: str = _field("kfo", "learned update: none is plain gradient descent", choices=UPDATES)
    psd: bool = _field(True, "KFO: use R^T R and L^T L in place of R and L")
    bias: bool | None = _field(None, "KFO: add a learned bias to each update; none adds it with hidden layers alone")
    hidden_layers: int = _field(0, "KFO: hidden Kronecker layers; 0 is the linear update", least=0, most=MOST_LAYERS)
    adapt_update: bool = _field(True, "KFO: adapt the factors too in the inner loop")
    first_order: bool = _field(False, "take the inner gradients as constants")
    checkpoint_inner: bool = _field(False, "recompute the inner steps in the backward pass to save memory")
    layers: int = _field(2, "convolution blocks (sinusoid: ignored)", least=1, most=MOST_LAYERS)
    hidden: int = _field(32, "channels of a block, or units of a hidden layer", least=1)
    init: str = _field("reference", "start of the network: see kfo_ext.networks (sinusoid: ignored)", choices=INITS)
    ways: int = _field(5, "classes of a task", least=2)
    shots: int = _field(5, "support examples of a class", least=1)
    queries: int = _field(5, "query examples of a class", least=1)
    steps: int = _field(5, "inner steps", least=1)
    fast_lr: float | None = _field(None, "inner learning rate; none is 0.1, for sinusoid 0.01", positive=True)
    meta_lr: float = _field(0.003, "outer learning rate, of Adam(0.9, 0.999)", positive=True)
    meta_lr_half_life: int = _field(
        0, "meta-iterations in which the outer learning rate halves; 0 keeps it constant", least=0
    )
    clip_norm: float = _field(0.0, "largest norm of the meta-gradient, longer ones are scaled; 0 is no limit", least=0)
    meta_batch: int = _field(16, "tasks of a meta-iteration", least=1)
    iterations: int = _field(1000, "meta-iterations", least=1)
    seed: int = _field(0, "seed of the parameters and of the training tasks", least=0)
    validation_every: int = _field(100, "meta-iterations between two validations, each followed by a save", least=1)
    validation_tasks: int = _field(200, "tasks of one validation", least=2)
    patience: int = _field(0, "stop after so many validations without a better one; 0 is never", least=0)
    workers: int = _field(0, "threads that prepare tasks", least=0, most=MOST_THREADS)
    threads: int = _field(0, "threads of torch; 0 leaves torch's own choice", least=0, most=MOST_THREADS)
    dtype: str = _field("float32", "floating-point type", choices=DTYPES)
    device: str = _field("cpu", "device of torch, such as cpu or cuda:0")
    precision: str = _field(
        "ieee",
        "of the network's convolutions: float32 as it is, tf32 (CUDA), or bf16 for the whole forward",
        choices=PRECISIONS,
    )
    channels_last: bool = _field(False, "torch's convolutions in channels-last memory (CUDA, or bf16)")
    cuda_graph: bool = _field(False, "capture a whole meta-iteration as one CUDA graph, and replay it")

    def __post_init__(self) -> None:
        # Not on top: the help of the command line reads the fields alone.
        import torch

        if self.fast_lr is None:
            # Set once, before anyone can read it: a frozen dataclass has no other way to fill in a default.
            object.__setattr__(self, "fast_lr", 0.01 if self.dataset == "sinusoid" else 0.1)
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), hints[item.name], item.metadata)
        if self.dataset == "omniglot" and self.data_root is None:
            raise ValueError("data_root: dataset 'omniglot' needs the folder of its archives, got none")
        if self.dataset == "sinusoid" and self.method == "anil":
            raise ValueError("method: dataset 'sinusoid' expects maml, its network has no separate head; got 'anil'")
        try:
            known = torch.device(self.device).type in ("cpu", "cuda")
        except RuntimeError:
            known = False
        if not known:
            raise ValueError(f"device: expected a device of torch such as 'cpu' or 'cuda:0', got {self.device!r}")
        self._check_speed()

    def _check_speed(self) -> None:
        """Refuse what would have no effect."""
        import torch

        on_cpu = torch.device(self.device).type == "cpu"
        here = f"has no effect on device {self.device!r}"
        if self.cuda_graph and on_cpu:
            raise ValueError(f"cuda_graph: expected a CUDA device, got {self.device!r}")
        if self.cuda_graph and self.checkpoint_inner:
            raise ValueError("cuda_graph: expected checkpoint_inner off: recomputed inner steps cannot be captured")
        if self.precision != "ieee" and self.dtype != "float32":
            raise ValueError(f"precision: {self.precision!r} has no effect on dtype {self.dtype!r}, expected 'float32'")
        if self.precision == "tf32" and on_cpu:
            raise ValueError(f"precision: 'tf32' {here}, expected a CUDA device or another precision")
        if self.channels_last and on_cpu and self.precision != "bf16":
            raise ValueError(f"channels_last: {here}, whose compiled convolution is channels-last already")
        if self.dataset == "sinusoid" and (self.precision == "tf32" or self.channels_last):
            name = "channels_last" if self.channels_last else "precision: 'tf32'"
            raise ValueError(f"{name} has no effect on dataset 'sinusoid', whose network has no convolution")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def measure(self) -> str:
        """What validation selects by: accuracy (highest), or for regression loss (lowest)."""
        return "loss" if self.dataset == "sinusoid" else "accuracy"

    def to_dict(self) -> dict[str, Any]:
        """Field name to plain value."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """Build a configuration from plain values.

        values: field name to value; absent fields take their defaults.
        source: what to name in a message.
        Raises: ValueError for an unknown key or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: expected an object of configuration values, got {type(values).__name__}")
        unknown = sorted(set(values) - {item.name for item in fields(cls)}, key=str)
        if unknown:
            raise ValueError(f"{source}: unknown configuration key {', '.join(map(repr, unknown))}")
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

        Raises: ValueError naming the file and what is wrong.
        """
        return cls.from_dict(read_json(path), str(path))


def difference(ours: Config, theirs: Config) -> str:
    """Name the fields in which two configurations cannot belong to one run; '' if there are none."""
    names = [item.name for item in fields(Config) if item.name not in RESUMABLE]
    parts = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return ", ".join(f"{name}: expected {a!r}, got {b!r}" for name, a, b in parts if a != b)


def settings(config: Config) -> dict[str, Any]:
    """The fields that decide the score of a checkpoint on given tasks."""
    return {name: value for name, value in config.to_dict().items() if name not in UNSCORED}


def _check(name: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> None:
    number = (int, float)
    flag = {bool: (bool,), bool | None: (bool, type(None))}
    expected = {**flag, int: (int,), float: number, float | None: number, str: (str,)}.get(hint, (str, type(None)))
    if not isinstance(value, expected) or (isinstance(value, bool) and hint not in flag):
        raise TypeError(f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if rules["choices"] and value not in rules["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(rules['choices'])}, got {value!r}")
    if rules["least"] is not None and not (value >= rules["least"] and is_number(value)):
        raise ValueError(f"{name}: expected at least {rules['least']}, got {value}")
    if isinstance(value, int) and value > rules["most"]:
        raise ValueError(f"{name}: expected at most {rules['most']}, got {value}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name}: expected text without null characters, got {value!r}")
    if rules["positive"] and not (value > 0 and is_number(value)):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
