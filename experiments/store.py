"""Result files: one for each entry and each specification of it; a file of another specification stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kfo_ext.bench.result import write_rows
from kfo_ext.runs.files import read_json

from .entry import Computed, Entry, specification
from .halving import Fixed, Following, Halving, StartOf
from .jobs import NUMERICS, Record, identity

RESULTS = Path(__file__).parent / "results"


class Results:
    """The result of one entry at one budget.

    entry: what is computed.
    budget: whose work.
    folder: of all result files.
    others: all entries, by name: one may follow another.

    Attributes:
        path: of the file.
        records: the runs so far, by their keys.
        value: what a function has computed; None before.
        environments: machine, versions and commit of the sessions that computed it.
    """

    def __init__(
        self, entry: Entry, budget: str, folder: Path = RESULTS, others: Mapping[str, Entry] = MappingProxyType({})
    ) -> None:
        self.entry, self.budget, self.folder, self.others = entry, budget, folder, others
        self.path = folder / entry.name / f"{budget}-{entry.key(budget)}.json"
        self.load()

    def load(self) -> None:
        """Read the file as it is now."""
        self.records: dict[str, Record] = {}
        self.value: dict[str, Any] | None = None
        self.environments: list[dict[str, Any]] = []
        if self.path.exists():
            content = read_json(self.path)
            self.records = {key: Record(**values) for key, values in content.get("runs", {}).items()}
            self.value = content.get("value")
            self.environments = content["environments"]

    @property
    def work(self) -> Halving | Fixed | Computed | None:
        """What is to be computed; None while it waits for the results of another entry."""
        work = self.entry.works[self.budget]
        if not isinstance(work, StartOf | Following):
            return work
        other = Results(self.others[work.of], self.budget, self.folder, self.others)
        if not isinstance(tuning := other.work, Halving):
            return None
        try:
            return work.resolved(tuning.finals(other.records))
        except LookupError:
            return None

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        work = self.work
        if work is None:
            return False
        return self.value is not None if isinstance(work, Computed) else not work.missing(self.records)

    def add(self, key: str, record: Record, environments: list[dict[str, Any]]) -> None:
        """Take in a run, and write the file."""
        record.environments = self._numbers(environments)
        if (old := self.records.get(key)) is not None:
            record.tests = record.tests + [test for test in old.tests if not record.has(identity(test))]
        self.records[key] = record
        self._write()

    def set(self, value: dict[str, Any], environments: list[dict[str, Any]]) -> None:
        """Take in what a function has computed, and write the file."""
        self._numbers(environments)
        self.value = value
        self._write()

    def _numbers(self, environments: list[dict[str, Any]]) -> list[int]:
        self.environments += [each for each in environments if each not in self.environments]
        return [self.environments.index(each) for each in environments]

    def _write(self) -> None:
        content: dict[str, Any] = {
            "entry": self.entry.name,
            "title": self.entry.title,
            "budget": self.budget,
            "numerics": NUMERICS,
            "specification": _plain(specification(self.entry.works[self.budget])),
            "environments": self.environments,
        }
        if self.value is not None:
            content["value"] = self.value
        else:
            content["runs"] = {key: asdict(record) for key, record in sorted(self.records.items())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.path, content)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
