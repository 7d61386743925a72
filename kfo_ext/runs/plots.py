"""Learning curves from metrics.jsonl, of one run or several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import atomic_write
from .metrics import Record, is_validation, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinguishable under every common form of colour blindness, without black and yellow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# Line styles distinguish runs in grey too.
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
FORMATS = (".png", ".svg", ".pdf")
SMOOTHING = 20
LONGEST_LABEL = 60
# A drawn artist of matplotlib, and its label.
Curve = tuple[Any, str]


def plot_runs(runs: Mapping[str, Path], picture: Path) -> None:
    """Draw the training curve (running mean) and the validations with their 95 % intervals of each run.

    Args:
        runs: label to metrics.jsonl.
        picture: PNG, SVG or PDF file to write or replace.

    Raises:
        ValueError: a metrics file cannot be read, runs have different measures, or the picture is another kind of file.
    """
    if picture.suffix not in FORMATS:
        raise ValueError(f"{picture}: expected the name of a picture, which ends in {', '.join(FORMATS)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = {label: read_metrics(path) for label, path in runs.items()}
    measure = _measure(records)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [
        curve
        for number, (label, history) in enumerate(records.items())
        for curve in _draw(axes, label, number, history, measure)
    ]
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel("accuracy on query examples (%)" if measure == "accuracy" else "mean loss of query examples")
    axes.grid(alpha=0.3)
    if drawn:
        _legend(axes, drawn)
    with atomic_write(picture) as file, warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, without a warning.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format=picture.suffix[1:], dpi=150)


def _measure(records: Mapping[str, list[Record]]) -> str:
    """The measure that all runs have: accuracy, or for regression the loss."""
    kinds = {label: "accuracy" in r for label, rs in records.items() for r in rs if not is_validation(r)}
    if len(set(kinds.values())) > 1:
        one, other = (next(label for label, kind in kinds.items() if kind == wanted) for wanted in (True, False))
        raise ValueError(f"runs: expected one measure, got the accuracy of {one} and the loss of {other}")
    return "accuracy" if all(kinds.values()) else "loss"


def _legend(axes: Axes, drawn: list[Curve]) -> None:
    # Labels are set after the legend is made, which would omit those that begin with an underscore.
    numbers = [str(number) for number in range(len(drawn))]
    title = f"training: mean of {SMOOTHING} iterations; validation: 95 % intervals"
    legend = axes.legend(
        [artist for artist, _ in drawn], numbers, frameon=False, title=title, title_fontsize="small", fontsize="small"
    )
    for text, (_, label) in zip(legend.get_texts(), drawn):
        # matplotlib would parse text between dollar signs as a formula.
        text.set_parse_math(False)
        text.set_text(_printable(label))


def _printable(label: str) -> str:
    """The end of a label on one line: a folder's name need not decode, and may be longer than the picture."""
    line = " ".join(label.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= LONGEST_LABEL else f"...{line[-LONGEST_LABEL:]}"


def _draw(axes: Axes, label: str, number: int, history: list[Record], measure: str) -> Iterator[Curve]:
    colour, style = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
    unit = 100.0 if measure == "accuracy" else 1.0
    training = [r for r in history if not is_validation(r) and r[measure] is not None]
    if training:
        values = _running_mean([unit * r[measure] for r in training])
        (line,) = axes.plot([r["iteration"] for r in training], values, style, color=colour, alpha=0.5, lw=1)
        yield line, f"{label}, training"
    validation = [r for r in history if is_validation(r) and r[f"validation_{measure}"] is not None]
    if validation:
        interval = "validation_interval" if measure == "accuracy" else "validation_loss_interval"
        bars = axes.errorbar(
            [r["iteration"] for r in validation],
            [unit * r[f"validation_{measure}"] for r in validation],
            [math.nan if r[interval] is None else unit * r[interval] for r in validation],
            color=colour,
            linestyle=style,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            capsize=2,
        )
        yield bars, f"{label}, validation"


def _running_mean(values: list[float]) -> list[float]:
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
