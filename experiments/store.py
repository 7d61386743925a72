"""Result files: one for each entry and specification; files of other specifications are not touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kfo_ext.bench.result import write_rows
from kfo_ext.runs.files import read_json

from .entry import Computed, Entry, specification
from .halving import Fixed, Following, Halving, StartOf
from .jobs import NUMERICS, Job, Record, identity

RESULTS = Path(__file__).parent / "results"


class Results:
    """The result of one entry at one budget.

    Args:
        entry: the entry.
        budget: the budget of its work.
        folder: folder of all result files.
        others: all entries by name, since an entry may follow another.

    Attributes:
        path: the result file.
        records: the runs so far, by key.
        value: the value of a function; None until it is computed.
        environments: machine, versions and commit of the sessions that computed it.
    """

    def __init__(
        self, entry: Entry, budget: str, folder: Path = RESULTS, others: Mapping[str, Entry] = MappingProxyType({})
    ) -> None:
        self.entry, self.budget, self.folder, self.others = entry, budget, folder, others
        self.path = folder / entry.name / f"{budget}-{entry.key(budget)}.json"
        self.load()

    def load(self) -> None:
        """Read the file."""
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
        """The work to compute; None while it waits for the results of another entry."""
        work = self.entry.works[self.budget]
        if isinstance(work, Computed):
            return self._followed(work) if work.of else work
        if not isinstance(work, StartOf | Following):
            return work
        finals = self._finals_of(work.of)
        return None if finals is None else work.resolved(finals)

    def _finals_of(self, name: str) -> list[Job] | None:
        """The final runs of another entry; None while they are not known."""
        other = Results(self.others[name], self.budget, self.folder, self.others)
        if not isinstance(tuning := other.work, Halving):
            return None
        try:
            return tuning.finals(other.records)
        except LookupError:
            return None

    def _followed(self, work: Computed) -> Computed | None:
        """A work with the settings found by other entries; None while one of them is not known."""
        found: dict[str, Any] = {}
        for name in work.of:
            if (finals := self._finals_of(name)) is None:
                return None
            found[name] = {option: value for option, value in finals[0].settings.items() if option != "seed"}
        return replace(work, options={**work.options, "settings": found})

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        work = self.work
        if work is None:
            return False
        if not isinstance(work, Computed):
            return not work.missing(self.records)
        if self.value is None or not work.of:
            return self.value is not None
        found = work.options["settings"]
        return self.value.get("settings", found) == found

    def add(self, key: str, record: Record, environments: list[dict[str, Any]]) -> None:
        """Add a run, and write the file."""
        record.environments = self._numbers(environments)
        if (old := self.records.get(key)) is not None:
            record.tests = record.tests + [test for test in old.tests if not record.has(identity(test))]
        self.records[key] = record
        self._write()

    def set(self, value: dict[str, Any], environments: list[dict[str, Any]]) -> None:
        """Store the value of a function, and write the file."""
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
