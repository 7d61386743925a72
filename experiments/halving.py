"""Successive halving, one rule for every method, as a function from known results to missing runs.

1. Train every inner rate with every initialization to the first rung. If the best rate is the smallest or the largest,
   extend the grid by one rate beyond it, up to `WIDENINGS` times.
2. Train the best `keep` of them to the second rung, and the best of those again with each other outer rate.
3. Keep `keep` runs at each further rung. Train the last setting with every seed, and test it.

A run that ends early because its loss is not finite is replaced by the next best one, and ranks after all others.
All runs of a comparison have the same stream of tasks. Scores are the best validation so far, on validation classes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .jobs import Job, Record, Settings, Test

WIDENINGS = 3
Records = Mapping[str, Record]
# Yields the jobs of each stage, and returns their outcome.
Stages = Generator[list[Job], None, Any]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A rung: the iterations to train to, and the number of runs kept from the previous rung."""

    iterations: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class Halving:
    """A method to be tuned.

    Attributes:
        base: the options that all runs share.
        rates: inner rates, in ascending order.
        inits: initializations of the network; empty for networks with a single one.
        meta_lrs: outer rates; the first rung uses that of `base`.
        first: iterations of the first rung.
        rungs: the second and further rungs; the last keeps one run.
        seeds: seeds of the final runs; tuning uses the first.
        tests: tests of the final runs.
    """

    base: Settings
    rates: tuple[float, ...]
    inits: tuple[str, ...]
    meta_lrs: tuple[float, ...]
    first: int
    rungs: tuple[Rung, ...]
    seeds: tuple[int, ...]
    tests: tuple[Test, ...]

    def __post_init__(self) -> None:
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates: expected ascending ones, got {self.rates}")
        if not self.rungs or self.rungs[-1].keep != 1:
            raise ValueError(f"rungs: expected the last one to keep one run, got {self.rungs}")

    def missing(self, records: Records) -> list[Job]:
        """The runs that can be computed now; empty when all are done."""
        for stage in self._stages(records):
            if jobs := [job for job in stage if not job.done_in(records)]:
                return jobs
        return []

    def finals(self, records: Records) -> list[Job]:
        """Return the final runs.

        Args:
            records: the known results.

        Returns:
            One run for each seed.

        Raises:
            LookupError: the tuning is not done.
        """
        tuning = self._tuning(records)
        while True:
            try:
                stage = next(tuning)
            except StopIteration as end:
                return self._finals(end.value)
            if not all(job.done_in(records) for job in stage):
                raise LookupError("the tuning is not done")

    def tuning(self, records: Records) -> list[Job]:
        """The known runs of the tuning, rung after rung."""
        found: list[Job] = []
        for stage in self._tuning(records):
            found += [job for job in stage if job not in found]
            if not all(job.done_in(records) for job in stage):
                break
        return found

    def _stages(self, records: Records) -> Stages:
        """The jobs of each stage; a stage follows from the results of those before it."""
        winner = yield from self._tuning(records)
        yield self._finals(winner)

    def _finals(self, winner: Settings) -> list[Job]:
        last = self.rungs[-1].iterations
        return [Job(settings={**winner, "seed": seed}, iterations=last, tests=self.tests) for seed in self.seeds]

    def _tuning(self, records: Records) -> Stages:
        """The stages before the final runs; returns the best setting."""
        grid = yield from self._widened(records)
        kept: list[Settings] = []
        for number, rung in enumerate(self.rungs):
            reached = self.rungs[number - 1].iterations if number else self.first
            kept = yield from _taken(_best(kept if number else grid, records, reached), records, rung)
            if number == 0:
                best = _best(kept, records, rung.iterations)[0]
                others = [best | {"meta_lr": rate} for rate in self.meta_lrs if rate != best["meta_lr"]]
                yield [Job(settings=each, iterations=rung.iterations) for each in others]
                kept += others
        return _best(kept, records, self.rungs[-1].iterations)[0]

    def _widened(self, records: Records) -> Stages:
        rates = list(self.rates)
        for widening in range(WIDENINGS + 1):
            grid = [self._setting(rate, init) for rate in rates for init in self.inits or (None,)]
            yield [Job(settings=each, iterations=self.first) for each in grid]
            winner = _best(grid, records, self.first)[0]["fast_lr"]
            if len(self.rates) == 1 or widening == WIDENINGS or rates[0] < winner < rates[-1]:
                break
            rates = [*rates, 2 * winner] if winner == rates[-1] else [winner / 2, *rates]
        return grid

    def _setting(self, rate: float, init: str | None) -> dict[str, Any]:
        start = {} if init is None else {"init": init}
        return {**self.base, "fast_lr": rate, **start, "seed": self.seeds[0]}


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Runs with fixed settings: the paper's own, and controls that change one setting at a time.

    Attributes:
        base: the options that all runs share.
        variants: the options that differ, by label.
        iterations: meta-iterations of each run.
        seeds: seeds of each variant.
        tests: tests of each run.
    """

    base: Settings
    variants: Mapping[str, Settings]
    iterations: int
    seeds: tuple[int, ...]
    tests: tuple[Test, ...]

    def missing(self, records: Records) -> list[Job]:
        """The runs that can be computed now."""
        return [job for jobs in self.jobs().values() for job in jobs if not job.done_in(records)]

    def jobs(self) -> dict[str, list[Job]]:
        """The runs of each variant, one for each seed."""
        return {
            label: [
                Job(settings={**self.base, **variant, "seed": seed}, iterations=self.iterations, tests=self.tests)
                for seed in self.seeds
            ]
            for label, variant in self.variants.items()
        }


@dataclass(frozen=True, kw_only=True)
class StartOf:
    """A method tuned only over inner and outer rates, with the initialization that another entry found.

    Attributes:
        of: the name of that entry.
        work: the tuning, whose `inits` are replaced.
    """

    of: str
    work: Halving

    def resolved(self, finals: Sequence[Job]) -> Halving:
        """The tuning, given the final runs of the other entry."""
        return replace(self.work, inits=(finals[0].settings["init"],))


@dataclass(frozen=True, kw_only=True)
class Following:
    """Runs at the setting that another entry found, with other options.

    Attributes:
        of: the name of that entry.
        variants: the options that differ, by label.
        without: options of the other entry that these runs do not have.
        iterations: as for `Fixed`.
        seeds: as for `Fixed`.
        tests: as for `Fixed`.
    """

    of: str
    variants: Mapping[str, Settings]
    without: tuple[str, ...] = ()
    iterations: int
    seeds: tuple[int, ...]
    tests: tuple[Test, ...]

    def resolved(self, finals: Sequence[Job]) -> Fixed:
        """The runs, given the final runs of the other entry."""
        base = {name: value for name, value in finals[0].settings.items() if name not in (*self.without, "seed")}
        return Fixed(base=base, variants=self.variants, iterations=self.iterations, seeds=self.seeds, tests=self.tests)


def _taken(candidates: list[Any], records: Records, rung: Rung) -> Stages:
    """The runs of a rung: as many as it keeps, and one more for each that ends early, while there are candidates."""
    taken = candidates[: rung.keep]
    while True:
        yield [Job(settings=each, iterations=rung.iterations) for each in taken]
        ended = sum(_ended(each, records, rung.iterations) for each in taken)
        if len(taken) == min(rung.keep + ended, len(candidates)):
            return taken
        taken = candidates[: rung.keep + ended]


def _best(settings: list[Any], records: Records, iterations: int) -> list[Any]:
    """Settings by score, the best first and those that ended early last; ties in the order of the grid."""

    def rank(each: Any) -> tuple[bool, float]:
        return _ended(each, records, iterations), -_record(each, records, iterations).best(iterations)

    return sorted(settings, key=rank)


def _ended(settings: Any, records: Records, iterations: int) -> bool:
    return _record(settings, records, iterations).iterations < iterations


def _record(settings: Any, records: Records, iterations: int) -> Record:
    return records[Job(settings=settings, iterations=iterations).key]
