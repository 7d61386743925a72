"""Options of the task families: frozen dataclasses that check themselves.

Without torch: configurations and the help of a command line read the fields, and import no family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_type_hints

from kfo_ext.tasks.checks import check_choice, check_count, check_number

# As published for mini-ImageNet.
SIDE = 84
COLOURS = ("gray", "rgb")
LABELS = ("separable", "bernoulli")

Targets = Literal["classes", "binary", "values"]
"""The kind of a family's labels: `classes` (n,) int64, `binary` (n, 1) float of 0 and 1, `values` (n, d) float."""


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), least: int | None = None) -> Any:
    """Make a field of an options dataclass; its metadata holds the help text and the bounds.

    Args:
        default: the default value.
        help: the help text, one line.
        choices: the only values allowed, if any.
        least: the least value allowed.

    Returns:
        The field.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True, kw_only=True)
class FamilyOptions:
    """The base of every family's options; a field of a subclass is an argument of the family's constructor.

    Raises:
        TypeError: a field has another type.
        ValueError: a field's value is out of range.
    """

    targets: ClassVar[Targets] = "classes"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), hints[item.name], item.metadata)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """The number of outputs of a network for these tasks."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ImageOptions(FamilyOptions):
    """Options of a family of image classes."""

    ways: int = option(5, "classes of a task", least=2)
    shots: int = option(5, "support images of a class", least=1)
    queries: int = option(5, "query images of a class", least=1)
    rotations: bool = option(False, "turn each class of each task by its own multiple of 90 degrees")

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.ways


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions(ImageOptions):
    """Options of a family of image classes read from files."""

    root: str = option("", "folder or archive that holds the data set")
    cache: str | None = option(None, "folder of the decoded images; none is $KFO_CACHE, else the user's cache folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.root:
            raise ValueError("root: expected the folder or archive that holds the data set, got none")


@dataclass(frozen=True, kw_only=True)
class GlyphsOptions(ImageOptions):
    """Options of Glyphs."""

    rotations: bool = option(True, "turn each class of each task by its own multiple of 90 degrees")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One channel."""
        return (1, 28, 28)


@dataclass(frozen=True, kw_only=True)
class OmniglotOptions(ArchiveOptions):
    """Options of Omniglot."""

    rotations: bool = option(True, "turn each class of each task by its own multiple of 90 degrees")
    download: bool = option(False, "fetch missing archives into root")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One channel."""
        return (1, 28, 28)


@dataclass(frozen=True, kw_only=True)
class CifarFsOptions(ArchiveOptions):
    """Options of CifarFs."""

    splits: str | None = option(None, "folder with train.txt, val.txt, test.txt; none is Bertinetto's split")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Red, green, blue."""
        return (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class CsvImagesOptions(ArchiveOptions):
    """Options of CsvImages."""

    side: int = option(SIDE, "pixels of a side; images of another size are resized", least=1)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Red, green, blue."""
        return (3, self.side, self.side)


@dataclass(frozen=True, kw_only=True)
class FoldersOptions(ArchiveOptions):
    """Options of Folders."""

    splits: str | None = option(None, "JSON file, or folder with train, val and test.txt; none reads root's folders")
    side: int = option(SIDE, "pixels of a side; images of another size are resized", least=1)
    colour: str = option("rgb", "channels of the images", choices=COLOURS)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One channel or three."""
        return (1 if self.colour == "gray" else 3, self.side, self.side)


@dataclass(frozen=True, kw_only=True)
class PointOptions(FamilyOptions):
    """Options of a family of points drawn from a formula."""

    shots: int = option(10, "support points of a task", least=1)
    queries: int = option(10, "query points of a task", least=1)

    targets: ClassVar[Targets] = "values"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One number."""
        return (1,)

    @property
    def outputs(self) -> int:
        """One number."""
        return 1


@dataclass(frozen=True, kw_only=True)
class SinusoidOptions(PointOptions):
    """Options of Sinusoid."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions(PointOptions):
    """Options of Linear."""

    noise: float = option(1.0, "standard deviation of the targets about the line", least=0)


@dataclass(frozen=True, kw_only=True)
class LogisticOptions(PointOptions):
    """Options of Logistic."""

    dimension: int = option(2, "dimension of the inputs", least=1)
    labels: str = option("separable", "1[theta^T x > 0], or drawn with probability sigma(theta^T x)", choices=LABELS)

    targets: ClassVar[Targets] = "binary"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """A vector."""
        return (self.dimension,)


def _check(name: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> None:
    types: dict[Any, Any] = {
        bool: bool,
        int: int,
        float: (int, float),
        str: str,
        str | None: (str, type(None)),
    }
    if not isinstance(value, types[hint]) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if rules["choices"]:
        check_choice(name, value, rules["choices"])
    if rules["least"] is not None and hint is int:
        check_count(name, value, rules["least"])
    elif rules["least"] is not None:
        check_number(name, value, rules["least"])
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name}: expected text without null characters, got {value!r}")
