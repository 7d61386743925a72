"""Figures of the result of `experiments.synthetic.logistic`: Figure 1 right, Figures B.1 and B.3, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kfo_ext.runs.plots import PALETTE

from .svg import styled, svg
from .synthetic import COLLAPSED, LINNETS, MODELS, TRAINING, UNSEEN

AFTER = {"sign": "sign of the logit", "sampled": "sampled predictions"}
LABELS = {"separable": "labels 1[theta^T x > 0]", "bernoulli": "labels drawn from sigma(theta^T x)"}
# The style of each curve; markers and dash patterns distinguish them without colours.
STYLES: Mapping[str, Mapping[str, Any]] = {
    "LR": {"color": "black", "linestyle": "-", "marker": "o"},
    "LinNet(2)": {"color": PALETTE[0], "linestyle": "--", "marker": "s"},
    "LinNet(3)": {"color": PALETTE[1], "linestyle": "-.", "marker": "^"},
    "LinNet(2), collapsed first": {"color": PALETTE[2], "linestyle": ":", "marker": "s", "markerfacecolor": "white"},
    "LinNet(3), collapsed first": {"color": PALETTE[3], "linestyle": ":", "marker": "^", "markerfacecolor": "white"},
}
# The number of points between two markers of a curve.
APART = 6


class Column(NamedTuple):
    """The panels of a column: the title, the metric, and names of curves."""

    title: str
    metric: str
    curves: Sequence[str]


def figure_1_right(result: Mapping[str, Any], labels: str) -> bytes:
    """Accuracy on unseen tasks by either metric; a row for each support."""
    curves = [f"{name}, {UNSEEN}" for name in MODELS]
    return _grid(result, labels, [Column(f"unseen tasks, {AFTER[metric]}", metric, curves) for metric in AFTER])


def figure_b1(result: Mapping[str, Any], metric: str) -> bytes:
    """Accuracy on training tasks and unseen tasks of separable labels by one metric; a row for each support."""
    return _grid(
        result,
        "separable",
        [
            Column(f"{part}, {AFTER[metric]}", metric, [f"{name}, {part}" for name in MODELS])
            for part in (TRAINING, UNSEEN)
        ],
    )


def figure_b3(result: Mapping[str, Any], labels: str) -> bytes:
    """LinNets, and LinNets collapsed before adaptation, on unseen tasks by either metric; a row for each support."""
    curves = [f"{name}, {UNSEEN}" for name in MODELS] + [f"{name}, {COLLAPSED}" for name in LINNETS]
    return _grid(result, labels, [Column(f"unseen tasks, {AFTER[metric]}", metric, curves) for metric in AFTER])


def drawings(result: Mapping[str, Any]) -> dict[str, bytes]:
    """All figures, by file name."""
    return {
        **{f"figure-1-right-{labels}.svg": figure_1_right(result, labels) for labels in LABELS},
        **{f"figure-b1-{metric}.svg": figure_b1(result, metric) for metric in AFTER},
        **{f"figure-b3-{labels}.svg": figure_b3(result, labels) for labels in LABELS},
    }


def _grid(result: Mapping[str, Any], labels: str, columns: Sequence[Column]) -> bytes:
    """A row of panels for each support, as reproducible SVG."""
    from matplotlib.figure import Figure

    settings = result["settings"]
    supports = settings["supports"]
    panels = {(panel["labels"], panel["support"], panel["metric"]): panel for panel in result["panels"]}
    with styled():
        figure = Figure(figsize=(4.2 * len(columns), 2.7 * len(supports) + 0.6), layout="constrained")
        grid = figure.subplots(len(supports), len(columns), sharex=True, sharey=True, squeeze=False)
        for row, support in zip(grid, supports):
            for axes, column in zip(row, columns):
                curves = panels[labels, support, column.metric]["curves"]
                _draw(axes, result["iterations"], {name: curves[name]["mean"] for name in column.curves})
                _draw_limits(axes, settings["best_accuracy"][labels])
                axes.set_title(f"{column.title}\nsupport {support}", fontsize=9)
            row[0].set_ylabel("accuracy on queries (%)")
        for axes in grid[-1]:
            axes.set_xlabel(f"meta-iterations, {settings['meta_batch']} tasks each")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        seeds = len(settings["seeds"])
        runs = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
        figure.suptitle(f"{LABELS[labels]}; {runs}", fontsize=10)
        return svg(figure)


def _draw(axes: Any, iterations: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
    for number, (name, mean) in enumerate(curves.items()):
        label = name.removesuffix(f", {TRAINING}").removesuffix(f", {UNSEEN}")
        axes.plot(
            iterations,
            [100 * value for value in mean],
            label=label,
            # Shifted, so that markers do not hide each other.
            markevery=(number % APART, APART),
            markersize=4.5,
            linewidth=1.3,
            **STYLES[label],
        )


def _draw_limits(axes: Any, best: float) -> None:
    axes.axhline(50, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)), label="chance")
    axes.axhline(100 * best, color="0.6", linewidth=0.8, linestyle=(0, (6, 2)), label="best possible")
    axes.set_ylim(45, 102)
    axes.grid(alpha=0.25)
