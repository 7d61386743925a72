"""What the registry holds: a row of a table or a curve of a figure, what was published, and what we compute for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .halving import Fixed, Following, Halving, StartOf
from .jobs import digest

BUDGETS = ("ci", "cpu", "gpu", "paper")
CERTAIN, INFERRED, UNKNOWN = "certain", "inferred", "unknown"


@dataclass(frozen=True)
class Published:
    """A number of the paper.

    where: table or figure, row and column.
    value: accuracy in %, or a learning rate; None where no copy that we have shows it.
    certainty: whether it is legible, follows from its position or the prose, or is unknown.
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

    inner: of the adaptation.
    outer: of meta-training.
    """

    inner: Published
    outer: Published


# What a report shows of a value: Markdown, in which pictures lie in `paper/`, and these pictures (SVG) by file name.
Shown = tuple[str, Mapping[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a function computes as a whole.

    function: of `roots` (data set to folder) and `folder` (for what it keeps between two calls), and `options`; gives
        plain values.
    version: to be raised when it computes something else.
    options: its other keywords.
    shown: what the report shows of its value; none shows nothing.
    of: entries whose winners it needs: `settings` is then another keyword, name to settings without the seed. A value
        that has them under `settings` is computed anew once there are other winners.
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

    name: on the command line.
    title: in the report.
    group: the entries that the report shows together.
    published: the paper's numbers.
    rates: the paper's learning rates.
    baseline: the entry that it is compared with, task by task.
    works: budget to what is computed; a budget that is not there is not run, and `why_not` says why.
    data: the data sets that it reads from a folder.
    choices: where the paper is silent, what we chose, and why.
    tried: where the result is off the paper's, what was tried.
    alone: no other job of a `run` is computed beside its jobs, as they measure time.
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
        """The name of what is computed: other settings or numerics have another one."""
        return digest(specification(self.works[budget]))


def specification(work: Work) -> dict[str, Any]:
    """All that decides the result of a work, as plain values."""
    if isinstance(work, Computed):
        name = f"{work.function.__module__}.{work.function.__qualname__}"
        followed = {"of": list(work.of)} if work.of else {}
        return {"function": name, "options": dict(work.options), "version": work.version, **followed}
    return asdict(work)


Roots = Mapping[str, Path]
