"""The pictures of the report as SVG, with the same bytes for the same matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from statistics import fmean
from typing import Any, NamedTuple

from kfo_ext.runs.plots import PALETTE

from ..halving import Halving
from ..jobs import Record
from ..store import Results
from ..svg import GRID, styled, svg
from .statistics import Summary

DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "x")
ACCURACY = "accuracy on validation classes (%)"
COLUMNS = 2


class Line(NamedTuple):
    """A curve.

    Attributes:
        x: iterations.
        y: accuracies.
        low: the lower end of a band around it.
        high: the upper end of the band.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def over_seeds(records: Sequence[Record]) -> Line | None:
    """Validations, mean and range over seeds, up to the iteration that all of them reached; None without any."""
    found = [dict(zip(record.at, record.accuracy)) for record in records]
    common = sorted(set.intersection(*map(set, found))) if found else []
    if not common:
        return None
    values = [[each[at] for each in found] for at in common]
    return Line(common, list(map(fmean, values)), list(map(min, values)), list(map(max, values)))


def curves(panels: Mapping[str, Mapping[str, Line]]) -> bytes:
    """Accuracy against meta-iterations: a panel for each title, a line with its band for each label."""
    with _figure(len(panels)) as (figure, grid, whole):
        looks = _looks()
        for axes, (title, lines) in zip(grid, panels.items()):
            for label, line in lines.items():
                look = next(looks)
                axes.plot(line.x, _percents(line.y), label=label, linewidth=1.4, **look, markevery=0.1)
                axes.fill_between(line.x, _percents(line.low), _percents(line.high), color=look["color"], alpha=0.15)
            axes.set_title(title, fontsize=9)
        _label(grid, "meta-iterations", ACCURACY)
        _legend(figure, *grid)
    return whole.getvalue()


def single_runs(panels: Mapping[str, Mapping[int, Record]]) -> bytes:
    """Accuracy against meta-iterations of single runs: a panel for each setting, a line for each seed."""
    with _figure(len(panels)) as (figure, grid, whole):
        for axes, (title, records) in zip(grid, panels.items()):
            for (seed, record), look in zip(sorted(records.items()), _looks()):
                axes.plot(record.at, _percents(record.accuracy), label=f"seed {seed}", **look, markevery=0.1)
            axes.set_title(title, fontsize=9)
            axes.set_ylim(0, 100)
        _label(grid, "meta-iterations", ACCURACY)
        _legend(figure, *grid)
    return whole.getvalue()


def tuning(panels: Mapping[str, Results]) -> bytes:
    """Accuracy at the first rung against the inner rate: a panel per entry, a line per initialization."""
    with _figure(len(panels)) as (figure, grid, whole):
        for axes, (title, results) in zip(grid, panels.items()):
            looks, found = _looks(), _first_rung(results)
            for start, points in found.items():
                rates, scores = zip(*sorted(points.items()))
                axes.plot(rates, _percents(scores), label=start.replace("_", " ") or "its start", **next(looks))
            axes.set_xscale("log")
            _ticks(axes, {rate for points in found.values() for rate in points})
            axes.set_title(title, fontsize=9)
            axes.set_ylim(0, 100)
        _label(grid, "inner learning rate", ACCURACY)
        _legend(figure, *grid)
    return whole.getvalue()


def _first_rung(results: Results) -> dict[str, dict[float, float]]:
    work = results.work
    assert isinstance(work, Halving)
    found: dict[str, dict[float, float]] = {}
    for job in work.tuning(results.records):
        record = results.records.get(job.key)
        if record is not None and record.reached(work.first) and job.settings["meta_lr"] == work.base["meta_lr"]:
            points = found.setdefault(job.settings.get("init", ""), {})
            points[job.settings["fast_lr"]] = record.best(work.first)
    return found


def against(series: Mapping[str, Mapping[float, Summary]], unit: str) -> bytes:
    """Test accuracy against an option, with the interval over seeds, or over tasks for a single seed."""
    with _figure(1) as (figure, (axes,), whole):
        for (label, points), look in zip(series.items(), _looks()):
            x = sorted(points)
            bars = [points[at].tasks if points[at].seeds is None else points[at].seeds for at in x]
            widths = [math.nan if bar is None else 100 * bar for bar in bars]
            axes.errorbar(x, [100 * points[at].mean for at in x], widths, label=label, capsize=3, **look)
        _ticks(axes, {at for points in series.values() for at in points})
        axes.set_xlabel(unit)
        axes.set_ylabel("accuracy on test classes (%)")
        _legend(figure, axes)
    return whole.getvalue()


def _ticks(axes: Any, values: Iterable[float]) -> None:
    """Put ticks only at these values."""
    ordered = sorted(values)
    axes.set_xticks(ordered, [f"{value:g}" for value in ordered], fontsize=8)
    axes.set_xticks([], minor=True)


def _percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _looks() -> Iterator[dict[str, Any]]:
    """Colours, dashes and markers that can be distinguished in grey."""
    for number, (colour, dashes, marker) in enumerate(zip(cycle(PALETTE), cycle(DASHES), cycle(MARKERS))):
        face = "white" if number % 2 else colour
        yield {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4, "markerfacecolor": face}


@contextmanager
def _figure(panels: int) -> Iterator[tuple[Any, list[Any], BytesIO]]:
    """A figure, the axes of its panels, and the file that receives the SVG at the end of the block."""
    from matplotlib.figure import Figure

    columns = min(panels, COLUMNS)
    rows = math.ceil(panels / columns)
    whole = BytesIO()
    with styled(**GRID):
        figure = Figure(figsize=(7, 4) if panels == 1 else (8, 2.6 * rows + 0.6), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[panels:]:
            axes.remove()
        yield figure, grid[:panels], whole
        whole.write(svg(figure))


def _label(grid: Sequence[Any], x: str, y: str) -> None:
    for number, axes in enumerate(grid):
        if number >= len(grid) - COLUMNS:
            axes.set_xlabel(x)
        if number % COLUMNS == 0:
            axes.set_ylabel(y, fontsize=8)


def _legend(figure: Any, *grid: Any) -> None:
    """One legend below all panels, each label once."""
    found = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
    if found:
        columns = 2 if max(map(len, found)) > 20 else 4
        figure.legend(found.values(), found, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
