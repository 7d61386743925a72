"""The outcome of an entry: a row for each setting, with its final runs or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..entry import Computed, Entry
from ..halving import Fixed, Halving, StartOf
from ..jobs import Job, Record, Settings, Test, decoded
from ..store import Results
from .statistics import Scores, Summary, difference, summary

# The settings that are equal for two rows with the same tasks.
TASKS = ("dataset", "ways", "shots", "queries", "rotations", "side", "colour")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting of an entry.

    Attributes:
        entry: the entry of the row.
        variant: its label if the entry has several; "" otherwise.
        work: the work; None if there is none, or if it waits for another entry.
        jobs: the final runs, one for each seed; empty until the setting is found.
        records: results of the finished final runs, by seed.
        reason: the reason why there is no score; "" if there is one.
        tried: the inner rates of the tuning; empty for a fixed setting.
    """

    entry: Entry
    variant: str = ""
    work: Halving | Fixed | None = None
    jobs: tuple[Job, ...] = ()
    records: Mapping[int, Record] = field(default_factory=dict)
    reason: str = ""
    tried: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The name in claims."""
        return f"{self.entry.name}/{self.variant}" if self.variant else self.entry.name

    @property
    def title(self) -> str:
        """The title in the report."""
        return f"{self.entry.title}: {self.variant}" if self.variant else self.entry.title

    @property
    def settings(self) -> Settings:
        """The settings of the runs; until they are found, those that all runs of the tuning share."""
        return self.jobs[0].settings if self.jobs else self.work.base if self.work else {}

    @property
    def iterations(self) -> int:
        """The iterations of the final runs."""
        if isinstance(self.work, Halving):
            return self.work.rungs[-1].iterations
        return self.work.iterations if self.work else 0

    @property
    def tuned(self) -> bool:
        """Whether the setting was tuned."""
        return bool(self.tried)

    @property
    def label(self) -> str:
        """The title, and whether the setting was tuned."""
        return f"{self.title}, tuned" if self.tuned else self.title

    @property
    def edge(self) -> str:
        """Whether the best inner rate is the "smallest" or the "largest" of those tried; "" if neither."""
        if len(self.tried) < 2 or not self.jobs:
            return ""
        rate = self.settings["fast_lr"]
        return "smallest" if rate == self.tried[0] else "largest" if rate == self.tried[-1] else ""

    @property
    def tests(self) -> tuple[Test, ...]:
        """The tests of the row."""
        return self.work.tests if self.work else ()

    def test(self, checkpoint: str) -> Test | None:
        """The test of a checkpoint on test classes, with the options of training."""
        plain = (
            test for test in self.tests if test.checkpoint == checkpoint and test.split == "test" and not test.changes
        )
        return next(plain, None)

    def scores(self, test: Test | None) -> Scores:
        """The accuracies by seed, for runs that have them."""
        if test is None:
            return {}
        found = {seed: record.test(test) for seed, record in self.records.items() if record.has(test)}
        return {
            seed: torch.tensor(decoded(each["correct"], each["queries"]), dtype=torch.float64)
            for seed, each in found.items()
            if each["correct"]
        }

    def failed(self, test: Test) -> int:
        """The number of runs whose checkpoint gave a number that is not finite in a test."""
        return sum(record.has(test) and bool(record.test(test).get("failure")) for record in self.records.values())

    def accuracy(self, test: Test | None = None) -> Summary | None:
        """The accuracy on a test, by default that of the best checkpoints; None without a score."""
        scores = self.scores(self.test("best") if test is None else test)
        return summary(scores) if scores else None

    def remarks(self) -> list[str]:
        """Remarks on seeds that have no score, or ended early."""
        found = []
        scores = self.scores(self.test("best"))
        for job in self.jobs:
            seed = job.settings["seed"]
            record = self.records.get(seed)
            if record is None:
                found.append(f"seed {seed} is not run yet")
            elif record.ended:
                kept = "its best checkpoint counts" if seed in scores else "it has no score"
                found.append(f"seed {seed} ended after iteration {record.iterations:,} ({record.ended}); {kept}")
            elif seed not in scores:
                found.append(f"seed {seed} has no finite score")
        return found


def rows(results: Results | None, entry: Entry) -> list[Row]:
    """Make the rows of an entry.

    Args:
        results: its results; None if nothing is computed at this budget.
        entry: the entry.

    Returns:
        The rows; none for a result of a function.
    """
    if results is None:
        return [Row(entry=entry, reason=entry.why_not or "not run at this budget")]
    work = results.work
    if isinstance(work, Fixed):
        return [_row(entry, work, results.records, jobs, variant=label) for label, jobs in work.jobs().items()]
    if isinstance(work, Halving):
        rates = tuple(sorted({job.settings["fast_lr"] for job in work.tuning(results.records)}))
        try:
            return [_row(entry, work, results.records, work.finals(results.records), tried=rates)]
        except LookupError:
            return [Row(entry=entry, work=work, reason="being tuned" if results.records else "not run yet")]
    planned = entry.works[results.budget]
    if isinstance(planned, Computed):
        return []
    base = planned.work if isinstance(planned, StartOf) else None
    return [Row(entry=entry, work=base, reason="not run yet: it takes the setting of an entry that is not tuned yet")]


def _row(entry: Entry, work: Halving | Fixed, records: Mapping[str, Record], jobs: list[Job], **facts: Any) -> Row:
    # An incomplete record belongs to a run that is still running.
    done = {job.settings["seed"]: records[job.key] for job in jobs if job.done_in(records)}
    row = Row(entry=entry, work=work, jobs=tuple(jobs), records=done, **facts)
    if row.scores(row.test("best")):
        return row
    return replace(row, reason="no run has a score" if done else "not run yet")


def paired(better: list[Row], worse: list[Row]) -> Scores:
    """Subtract the sum of the worse rows' scores from that of the better ones, task by task.

    Args:
        better: the rows with a plus sign.
        worse: the rows with a minus sign.

    Returns:
        The differences by common seed; may be empty.

    Raises:
        ValueError: the rows' tasks differ.
    """
    every = [*better, *worse]
    if not all(row.scores(row.test("best")) for row in every):
        return {}
    kinds = {tuple(row.settings.get(name) for name in TASKS) for row in every}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(row.name for row in every)}: expected scores of the same tasks, got {kinds}")
    return difference(*([row.scores(row.test("best")) for row in part] for part in (better, worse)))


@dataclass(frozen=True)
class Book:
    """The contents of the report.

    Attributes:
        entries: the entries by name.
        results: results of the entries with this budget, by name.
        rows: the rows of every entry, in order.
    """

    entries: Mapping[str, Entry]
    results: Mapping[str, Results]
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, entries: Mapping[str, Entry], budget: str, folder: Path) -> Book:
        """The results in a folder."""
        results = {
            name: Results(entry, budget, folder, entries) for name, entry in entries.items() if budget in entry.works
        }
        return cls(entries, results, tuple(row for e in entries.values() for row in rows(results.get(e.name), e)))

    def row(self, name: str) -> Row:
        """Find a row by its name in claims.

        Args:
            name: the name of an entry, or entry/variant.

        Returns:
            The row.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        # The variants of an entry are unknown until it is run.
        if (entry := self.entries.get(name.partition("/")[0])) is None or "/" not in name:
            raise ValueError(f"{name}: expected an entry or a variant of one; `python -m experiments list` shows them")
        return Row(entry=entry, reason="not run yet")
