"""Learning curves from metrics.jsonl, of one run or several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from .files import atomic_write
from .metrics import Record, is_validation, read_metrics

# Okabe and Ito's colours, apart for every common form of colour blindness; black and yellow left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SMOOTHING = 20


def plot_runs(runs: Mapping[str, Path], picture: Path) -> None:
    """Draw the training curve (running mean) and the validations with their 95 % intervals of each run.

    runs: label to metrics.jsonl.
    picture: PNG file to write or replace.
    Raises: ValueError if a metrics file cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = {label: read_metrics(path) for label, path in runs.items()}
    measure = (
        "accuracy" if all("accuracy" in r for rs in records.values() for r in rs if not is_validation(r)) else "loss"
    )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, history) in enumerate(records.items()):
        _draw(axes, label, PALETTE[number % len(PALETTE)], history, measure)
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel(f"{measure} on query examples")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(frameon=False)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw(axes, label: str, colour: str, history: list[Record], measure: str) -> None:
    training = [r for r in history if not is_validation(r) and r[measure] is not None]
    if training:
        values = _running_mean([r[measure] for r in training])
        axes.plot([r["iteration"] for r in training], values, color=colour, alpha=0.5, lw=1, label=f"{label}, training")
    validation = [r for r in history if is_validation(r) and r[f"validation_{measure}"] is not None]
    if validation:
        interval = "validation_interval" if measure == "accuracy" else "validation_loss_interval"
        axes.errorbar(
            [r["iteration"] for r in validation],
            [r[f"validation_{measure}"] for r in validation],
            [math.nan if r[interval] is None else r[interval] for r in validation],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{label}, validation",
        )


def _running_mean(values: list[float]) -> list[float]:
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
