"""The entries of the registry: a row of a table or a curve of a figure, its published numbers, and our computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .halving import Fixed, Following, Halving, StartOf
from .jobs import digest

BUDGETS = ("ci", "cpu", "gpu", "paper")
# What the report calls a data set, by the name of its folder.
DATA_SETS = {"omniglot": "Omniglot", "cifar_fs": "CIFAR-FS", "grocery84": "grocery84"}
CERTAIN, INFERRED, UNKNOWN = "certain", "inferred", "unknown"


@dataclass(frozen=True)
class Published:
    """A number of the paper.

    Attributes:
        where: table or figure, row and column.
        value: accuracy in %, or a learning rate; None if no available copy shows it.
        certainty: whether the number is legible, inferred from its position or the prose, or unknown.
    """

    where: str
    value: float | None = None
    certainty: str = CERTAIN

    def __post_init__(self) -> None:
        if (self.value is None) != (self.certainty == UNKNOWN):
            raise ValueError(f"{self.where}: expected a value, or certainty {UNKNOWN!r}, got {self.value}")


@dataclass(frozen=True)
class Rates:
    """Learning rates of the paper's tables D.5 to D.7.

    Attributes:
        inner: inner learning rate.
        outer: outer learning rate.
    """

    inner: Published
    outer: Published


# A value in the report: Markdown that refers to pictures in `paper/`, and these pictures (SVG) by file name.
Shown = tuple[str, Mapping[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A result computed by one function.

    Attributes:
        function: takes `roots` (data set to folder), `folder` (for its state between two calls) and `options`; returns
            plain values.
        options: its other keywords.
        version: to be increased when the function computes something else.
        shown: the value in the report; None shows nothing.
        of: entries whose winners it needs: it then gets a keyword `settings`, name to settings without the seed. A
            value with `settings` is computed again when the winners change.
    """

    function: Callable[..., dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1
    shown: Callable[[Mapping[str, Any]], Shown] | None = None
    of: tuple[str, ...] = ()


Work = Halving | Fixed | StartOf | Following | Computed


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a table or a curve of a figure.

    Attributes:
        name: name on the command line.
        title: title in the report.
        group: the group of entries that the report shows together.
        works: the work of each budget; an absent budget is not run, for the reason in `why_not`.
        published: the paper's numbers.
        rates: the paper's learning rates.
        baseline: the entry to compare with, task by task.
        data: the data sets that it reads from a folder.
        choices: our choices where the paper states nothing, with reasons.
        tried: experiments on a deviation from the paper's result.
        alone: whether no other job of a `run` may run at the same time, since its jobs measure time.
        why_not: the reason for absent budgets.
    """

    name: str
    title: str
    group: str
    works: Mapping[str, Work]
    published: tuple[Published, ...] = ()
    rates: Rates | None = None
    baseline: str = ""
    data: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    alone: bool = False
    why_not: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self.works) - set(BUDGETS):
            raise ValueError(f"{self.name}: expected budgets of {', '.join(BUDGETS)}, got {', '.join(unknown)}")
        if not self.works and not self.why_not:
            raise ValueError(f"{self.name}: says neither what is computed nor why nothing is")

    def key(self, budget: str) -> str:
        """The key of a result; other settings or numerics have another one."""
        return digest(specification(self.works[budget]))


def specification(work: Work) -> dict[str, Any]:
    """Everything that determines the result of a work, as plain values."""
    if isinstance(work, Computed):
        name = f"{work.function.__module__}.{work.function.__qualname__}"
        followed = {"of": list(work.of)} if work.of else {}
        return {"function": name, "options": dict(work.options), "version": work.version, **followed}
    return asdict(work)


Roots = Mapping[str, Path]
