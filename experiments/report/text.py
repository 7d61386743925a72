"""The page: prose, tables and pictures, from the registry and the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..entry import DATA_SETS, Computed, Entry
from ..halving import Halving
from ..markdown import FOLDER, picture
from ..registry.claims import Claim
from ..registry.groups import Group
from . import pictures, tables
from .claims import LEAST_SEEDS, judged, off
from .outcomes import Book, Row, paired
from .pictures import Line, over_seeds
from .statistics import summary

INTRODUCTION = f"""# The paper, reproduced

This page compares the tables and figures of the paper with what `kfo_ext` gives. `python -m experiments run` computes
what is missing of the results, and `python -m experiments report` writes this page and its pictures from the committed
result files, with no other input. Do not edit it.

## How to read it

- **Accuracy** is the share of query examples of unseen classes that are right, in %. Differences are in percentage
  points. An empty cell holds no number; the cell beside it says why.
- **Paper** is the published number, blank where no copy that we have shows it. "Inferred" marks a number that follows
  from its position in a damaged table, or from the prose.
- **Over seeds** is half the 95 % interval (Student's t) of the mean over independent runs: start of the network, stream
  of training tasks. It needs two seeds. **Over tasks** is that of the mean over test tasks, each averaged over the
  seeds: all runs are tested on one list of tasks.
- **Budget** is the number of meta-iterations of each final run and of tasks in each of them, of runs with other seeds,
  and of test tasks.
- **Differences** are paired: the same test tasks, and the seeds that both sides have.
- **Tuned** rows follow one rule, successive halving. All inner learning rates and starts of the network run to the
  first rung, and the best of them go on; the outer learning rate is then varied on the best one. Where the best inner
  rate is at the edge of its grid, the grid is widened; "the largest tried" marks a winner that is still at the edge.
  A run whose loss is not finite ends, and the next best takes its place. Selection uses validation classes alone.
- **Data.** The classes are split once, the same way for every seed; learn2learn, which the paper uses, splits Omniglot
  anew for each seed of a run. Each class of an Omniglot task has a rotation of its own; in learn2learn all classes of a
  task get the rotation drawn last. The published tasks are therefore not exactly these.
- **A claim** is reproduced or reversed if the 95 % interval over at least {LEAST_SEEDS} seeds of its paired difference
  excludes zero, and undecided otherwise.
"""


class Page:
    """Collects the parts of the page and their pictures.

    Args:
        book: the results.
        path: path of the page.
    """

    def __init__(self, book: Book, path: Path) -> None:
        self.book, self.path = book, path
        self.parts: list[str] = []
        self.pictures: dict[str, bytes] = {}

    def add(self, *parts: str) -> None:
        """Append parts, except empty ones."""
        self.parts += [part.strip("\n") + "\n" for part in parts if part]

    def picture(self, name: str, drawn: bytes, caption: str) -> None:
        """Append a picture with its caption."""
        self.pictures[f"{name}.svg"] = drawn
        self.add(picture(f"{name}.svg", caption))

    def text(self) -> str:
        """Return the whole text.

        Returns:
            The Markdown.

        Raises:
            ValueError: the text and the pictures do not match.
        """
        whole = "\n".join(self.parts)
        shown = set(re.findall(rf"\]\({FOLDER}/([^)]+\.svg)\)", whole))
        if shown != set(self.pictures):
            raise ValueError(
                f"pictures: expected those that the text shows, {sorted(shown)}, got {sorted(self.pictures)}"
            )
        return whole


def page(
    book: Book,
    path: Path,
    *,
    groups: Sequence[Group],
    claims: Sequence[Claim],
    headline: Mapping[str, str],
    collapse: Sequence[str],
) -> Page:
    """Make the page on all results.

    Args:
        book: the results.
        path: path of the page.
        groups: its sections.
        claims: the paper's statements.
        headline: the entries whose validations the first picture shows, by label; the text states the difference of the
            first two.
        collapse: entries whose single runs are shown.

    Returns:
        The page.

    Raises:
        ValueError: the group of an entry has no section, or two entries of a group have the same title.
    """
    _check(book.entries.values(), groups)
    made = Page(book, path)
    made.add(INTRODUCTION)
    _headline(made, headline)
    _claims(made, claims)
    for group in groups:
        _group(made, group)
    _off(made)
    _collapse(made, collapse)
    _tuning(made, groups)
    return made


def _check(entries: Iterable[Entry], groups: Sequence[Group]) -> None:
    names = [group.name for group in groups]
    titles: set[tuple[str, str]] = set()
    for entry in entries:
        if (entry.group, entry.title) in titles:
            raise ValueError(f"{entry.name}: expected a title of its own in {entry.group}, got {entry.title!r}")
        titles.add((entry.group, entry.title))
        if entry.group not in names:
            raise ValueError(
                f"{entry.name}: expected a group of registry/groups.py, got {entry.group!r}; add a line there"
            )


def _headline(made: Page, headline: Mapping[str, str]) -> None:
    rows = {label: made.book.row(name) for label, name in headline.items()}
    made.add("## The headline: MAML and META-KFO, each tuned, and at the paper's setting")
    first, second = list(rows.values())[:2]
    if scores := paired([first], [second]):
        less = summary(scores)
        intervals = f"{tables.half(less.seeds) or 'no interval'} over seeds, {tables.half(less.tasks)} over tasks"
        made.add(
            f"{first.title} less {second.title}, both tuned: {tables.percent(less.mean, sign=True)} points "
            f"({intervals}; seeds: {less.n})."
        )
    else:
        made.add("The tuned runs are not complete yet.")
    _curves(made, "headline", {"": rows})


def _curves(made: Page, name: str, panels: Mapping[str, Mapping[str, Row]]) -> None:
    drawn: dict[str, dict[str, Line]] = {}
    seeds = []
    for title, rows in panels.items():
        for label, row in rows.items():
            if line := over_seeds(list(row.records.values())):
                drawn.setdefault(title, {})[label] = line
                seeds.append(f"{label}: {len(row.records)}")
    if drawn:
        caption = (
            "Accuracy on validation classes against meta-iterations, as far as every seed came: mean over seeds, with"
        )
        made.picture(name, pictures.curves(drawn), f"{caption} their range as a band. Seeds: {'; '.join(seeds)}.")


def _claims(made: Page, claims: Sequence[Claim]) -> None:
    if claims:
        made.add("## The paper's claims", tables.claims([judged(claim, made.book) for claim in claims]))


def _group(made: Page, group: Group) -> None:
    entries = [entry for entry in made.book.entries.values() if entry.group == group.name]
    if not entries:
        return
    rows = [row for row in made.book.rows if row.entry.group == group.name]
    made.add(f"## {group.title}", group.text)
    if rows:
        _comparison(made, rows)
        panels: dict[str, dict[str, Row]] = {}
        for row in rows:
            data = ", ".join(DATA_SETS.get(name, name) for name in row.entry.data)
            panels.setdefault(data, {})[row.title] = row
        _curves(made, group.name, panels)
        _against(made, group)
    for entry in entries:
        _shown(made, entry)
    made.add("".join(f"- {entry.title}: {choice}.\n" for entry in entries for choice in entry.choices))
    made.add(tables.sources([entry.name for entry in entries], made.book.results, made.path))


def _comparison(made: Page, rows: Sequence[Row]) -> None:
    made.add(tables.accuracies(rows, made.book))
    made.add("".join(f"- {row.title}: {remark}.\n" for row in rows if row.records for remark in row.remarks()))
    for title, of in SUBTABLES.items():
        if found := of(rows):
            made.add(f"{title}:", found)


SUBTABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "Settings": tables.settings,
    "Protocol": tables.protocols,
    "Checkpoints": tables.checkpoints,
    "Other options at test than in training, with the larger interval": tables.changes,
}


def _against(made: Page, group: Group) -> None:
    for against in group.against:
        series = {}
        for label, names in against.series.items():
            rows = [made.book.row(name) for name in names]
            series[label] = {row.settings[against.option]: found for row in rows if (found := row.accuracy())}
        drawn = {label: points for label, points in series.items() if points}
        if drawn:
            caption = f"Accuracy on test classes against {against.unit}. Bars are 95 % intervals over seeds; over tasks"
            svg = pictures.against(drawn, against.unit)
            made.picture(f"{group.name}-{against.option}", svg, f"{caption} where there is one seed.")


def _shown(made: Page, entry: Entry) -> None:
    results = made.book.results.get(entry.name)
    if results is None or not isinstance(work := entry.works[results.budget], Computed):
        return
    if not results.complete or results.value is None:
        made.add(f"{entry.title}: not run yet.")
    elif work.shown is not None:
        text, drawn = work.shown(results.value)
        made.add(text)
        made.pictures |= drawn


def _off(made: Page) -> None:
    made.add("## Numbers off the paper")
    made.add(
        "Rows whose published number lies outside our interval: the larger one of those over seeds and over tasks.",
        tables.off_the_paper(off(made.book)) or "There is none so far.",
    )


def _collapse(made: Page, names: Sequence[str]) -> None:
    rows = [row for row in made.book.rows if row.entry.name in names]
    made.add(
        "## The collapse at the paper's setting, and what prevents it",
        "A run collapses where its last checkpoint is far below its best one. The controls change one factor of the "
        "published setting at a time.",
    )
    drawn = {}
    for row in rows:
        if with_validation := {seed: record for seed, record in row.records.items() if record.at}:
            drawn[row.title] = with_validation
    if not drawn:
        made.add("These runs are not done yet.")
        return
    made.add(tables.single_runs(rows))
    caption = "Accuracy on validation classes of every run, a line for each seed"
    made.picture("collapse-runs", pictures.single_runs(drawn), f"{caption}.")


def _tuning(made: Page, groups: Sequence[Group]) -> None:
    made.add(
        "## Tuning, every run",
        "Each cell holds the best validation accuracy, in %, by each rung that the run came to. Columns are starts "
        "of the network.",
    )
    for group in groups:
        found = {
            entry.title: results
            for entry in made.book.entries.values()
            if entry.group == group.name and (results := made.book.results.get(entry.name)) and results.records
            if isinstance(results.work, Halving)
        }
        if not found:
            continue
        made.add(f"### {group.title}")
        for title, results in found.items():
            made.add(f"{title}:", tables.tuning(results))
        caption = f"{group.title}: validation accuracy at the first rung against the inner rate, a line for each start"
        made.picture(f"tuning-{group.name}", pictures.tuning(found), f"{caption}.")
