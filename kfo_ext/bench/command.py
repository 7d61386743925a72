"""`kfo bench`: measure the points of some axes, print them, and write results and pictures to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch

from kfo_ext.bench import fits, plots, report
from kfo_ext.bench.cases import ORDERS
from kfo_ext.bench.measure import one_line
from kfo_ext.bench.points import AXES, QUICK_VALUES, VALUES, Point, points_of
from kfo_ext.bench.providers import PROVIDERS, Provider
from kfo_ext.bench.result import environment, warn_unless_committed
from kfo_ext.bench.roofs import measure_roofs
from kfo_ext.bench.rows import Row, empty_row, fails, rows_of
from kfo_ext.ops import library


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure; names of `points.AXES`, `points.GROUPS`, `providers.PROVIDERS` and `cases.ORDERS`.

    Attributes:
        quick: a few points of every axis.
        axes: names of the axes.
        groups: names of the problems, for the axes tasks, hidden and psd.
        tasks: values of the axis tasks; empty for the default ones.
        providers: empty for all; `quick` then excludes those that compile.
        orders: names of the orders.
        repeats: samples of each, at most.
        seconds: length of one sample.
        budget: seconds for the samples of one order at one point.
        limit: seconds after which no further point is begun.
        device: cpu or cuda.
        threads: torch's threads, by default its own choice.

    Raises:
        ValueError: a name is unknown or a number is out of range.
    """

    quick: bool = False
    axes: tuple[str, ...] = tuple(AXES)
    groups: tuple[str, ...] = ("CNN(2)",)
    tasks: tuple[int, ...] = ()
    providers: tuple[str, ...] = ()
    orders: tuple[str, ...] = ORDERS
    repeats: int = 15
    seconds: float = 0.02
    budget: float = 20.0
    limit: float | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        self.points()
        for name, known in (("providers", PROVIDERS), ("orders", ORDERS)):
            for item in getattr(self, name):
                if item not in known:
                    raise ValueError(f"{name}: expected some of {', '.join(known)}, got {item!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: 'cuda' is not available here")
        for name, values in (("tasks", self.tasks), ("repeats", (self.repeats,)), ("threads", (self.threads,))):
            for value in values:
                if value is not None and value < 1:
                    raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("seconds", "budget", "limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected seconds above 0, got {value}")

    def points(self) -> list[Point]:
        """The points of these axes, axis after axis; under a limit the first point of each axis comes first."""
        values = dict(QUICK_VALUES if self.quick else VALUES)
        if self.tasks:
            values["tasks"] = self.tasks
        points = points_of(self.axes, self.groups, values)
        return sorted(points, key=lambda point: values[point.axis].index(point.x)) if self.limit else points


def available(settings: Settings) -> tuple[dict[str, Provider], list[Row]]:
    """The providers that can run, and a row for each that cannot."""
    here: dict[str, Provider] = {}
    rows = []
    for name in settings.providers or PROVIDERS:
        provider, reason = PROVIDERS[name], None
        if settings.quick and provider.compiled and not settings.providers:
            reason = "left out: --quick, and compiling takes longer than timing; name it in --providers"
        else:
            try:
                provider.check(torch.device(settings.device))
            except Exception as error:  # any error is a result to report
                reason = f"cannot run here: {one_line(error)}"
        if reason is None:
            here[name] = provider
        else:
            rows.append(empty_row(provider=name, ours=provider.ours, status=reason))
    return here, rows


def run(settings: Settings, folder: Path, echo: Callable[[str], None]) -> bool:
    """Measure, print, and write results.csv, results.json and pictures.

    Args:
        settings: what to measure.
        folder: created if absent; results there are replaced after every point.
        echo: receives one line at a time.

    Returns:
        False if a provider of kfo_ext gave wrong numbers.

    Raises:
        ValueError: the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for the results, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        # Autograd differentiates on the stream of the forward call, and the default stream does not allow capture.
        with torch.cuda.stream(torch.cuda.Stream()) if settings.device == "cuda" else nullcontext():
            return _run(settings, folder, echo)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings, folder: Path, echo: Callable[[str], None]) -> bool:
    def say(text: str) -> None:
        for each in report.wrapped(text):
            echo(each)

    start, device = perf_counter(), torch.device(settings.device)
    facts = environment() | {"backends": library.status(), "settings": asdict(settings)}
    warn_unless_committed(facts)
    if library.status()["cpu"][0]:
        facts["cpu_isa"] = library.cpu_isa()
    roofs = measure_roofs(device, min(settings.repeats, 7), settings.seconds)
    facts["roofs"] = roofs.facts()
    say(f"{facts['device'] if settings.device == 'cuda' else facts['processor']}, torch {facts['torch']}, "
         f"{facts['torch_threads']} threads, commit {facts['commit']}")  # fmt: skip
    peak = "not measured" if roofs.flops is None else f"{roofs.flops / 1e9:.0f} GFLOP/s"
    say(f"roofs: {peak} ({roofs.flops_from}), copy {roofs.floor.bandwidth / 1e9:.0f} GB/s")
    say(report.LEGEND)
    providers, rows = available(settings)
    for row in rows:
        say(report.line(row))
    measured: dict[tuple, list[Row]] = {}
    skipped: dict[tuple, Row] = {}
    for point in settings.points():
        if point.same not in measured and settings.limit and perf_counter() - start > settings.limit:
            reason = f"left out: {settings.limit:g} s were spent before it"
            say("")
            say(f"{point.label}: {reason}")
            rows.append(empty_row(axis=point.axis, x=point.x, group=point.group, status=reason))
            skipped.setdefault(point.same, rows[-1])
            continue
        if point.same not in measured:
            measured[point.same] = rows_of(
                point, providers, settings.orders, roofs, device,
                repeats=settings.repeats, seconds=settings.seconds, budget=settings.budget,
            )  # fmt: skip
        here = [row | {"axis": point.axis, "x": point.x, "group": point.group} for row in measured[point.same]]
        for text in report.table(here):
            say(text)
        rows += here
        _write(folder, rows, facts, perf_counter() - start)
    once = [row for point_rows in measured.values() for row in point_rows]
    ends = (*report.losses(once), *report.left_out([*skipped.values(), *once]))
    for text in (*report.fit_table(fits.fits(rows)), "", *ends):
        say(text)
    pictures = plots.draw(_write(folder, rows, facts, perf_counter() - start), folder)
    say(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows measured in {perf_counter() - start:.0f} s")
    say(f"written: {folder / 'results.csv'}, results.json, {', '.join(path.name for path in pictures)}")
    say(report.summary(once))
    return not any(fails(row) for row in rows)


def _write(folder: Path, rows: list[Row], facts: Mapping[str, object], elapsed: float) -> Row:
    return report.write(folder, rows, {**facts, "elapsed_s": elapsed, "fits": fits.fits(rows)})
