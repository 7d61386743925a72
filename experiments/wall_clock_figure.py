"""The picture of a result of `experiments.wall_clock`, as SVG: accuracy against seconds, and seconds to the target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from kfo_ext.runs.plots import PALETTE

from .entry import Shown
from .markdown import picture, table
from .svg import GRID, styled, svg
from .wall_clock import PEER

# Titles of methods; others have their own names.
TITLES = {
    "omniglot-cnn2-kfo": "META-KFO",
    "omniglot-cnn2-kfo-fixed": "META-KFO, fixed factors",
    "omniglot-cnn2-kfo-hidden": "META-KFO, hidden layers",
    "omniglot-cnn2-maml": "MAML",
    "omniglot-cnn2-msgd": "Meta-SGD",
    "omniglot-cnn2-mc": "Meta-Curvature",
    "omniglot-cnn2-tnet": "T-Net",
    "omniglot-cnn2-linnet": "LinNet",
}
MARKERS = "os^DvPX*<>"
PICTURE = "wall-clock.svg"
GREY = "0.35"
Run = Mapping[str, Any]


def shown(value: Mapping[str, Any]) -> Shown:
    """The part of the report: the picture with its caption, and the seconds of every seed."""
    goal = f"{100 * value['target']:g} %"
    caption = (
        f"Accuracy on validation classes against seconds of meta-training, and seconds to {goal}: {_setting(value)}. "
        "Diamonds are single seeds; hatched bars did not get there."
    )
    rows = [
        (
            title(label),
            ", ".join("none" if run["seconds"] is None else f"{run['seconds']:,.1f}" for run in runs),
            ", ".join("none" if run["iterations"] is None else f"{run['iterations']:,}" for run in runs),
            f"{_seconds_of_one(runs):.3g}",
        )
        for label, runs in value["runs"].items()
    ]
    head = ("method", f"seconds to {goal}, by seed", "meta-iterations", "seconds of one")
    parts = [picture(PICTURE, caption), table(head, rows).rstrip()]
    if value["peers"]:
        parts.append(
            f"learn2learn {value[PEER]} meta-trains from the same start with the same rates, Adam, tasks and "
            f"validations. Its first loss and meta-gradients are ours up to {max(value['apart'].values()):.0e} "
            "(relative, in float64)."
        )
    return "\n\n".join(parts) + "\n", {PICTURE: drawing(value)}


def _seconds_of_one(runs: Sequence[Run]) -> float:
    """The mean seconds of a meta-iteration over all seeds."""
    return sum(_spent(run) for run in runs) / max(1, sum(run["curve"][-1][1] for run in runs if run["curve"]))


def drawing(value: Mapping[str, Any]) -> bytes:
    """Draw two panels, with the same bytes for the same matplotlib.

    The left panel shows the curve of each method's median seed, by seconds to the target. The right panel shows these
    seconds with a mark for each seed, or hatched the seconds after which the target was not reached. learn2learn's are
    dashed and pale.

    Args:
        value: the result of `experiments.wall_clock`.

    Returns:
        The SVG file.
    """
    from matplotlib.figure import Figure

    medians = {label: median(runs) for label, runs in value["runs"].items()}
    looks = dict(zip((label for label in medians if not _is_peer(label)), _looks()))
    with styled(**GRID, **{"axes.axisbelow": True}):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _curves(left, medians, looks, value["target"])
        _bars(right, value["runs"], medians, looks, value["target"])
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(_setting(value), fontsize=9)
        return svg(figure)


def median(runs: Sequence[Run]) -> Run:
    """The median run by seconds to the target; runs that have not reached it rank last."""
    return sorted(runs, key=lambda run: math.inf if run["seconds"] is None else run["seconds"])[len(runs) // 2]


def title(label: str) -> str:
    """The title of a method."""
    name = label.removeprefix(f"{PEER} ")
    return f"{PEER}: {TITLES.get(name, name)}" if _is_peer(label) else TITLES.get(name, name)


def _is_peer(label: str) -> bool:
    return label.startswith(f"{PEER} ")


def _looks() -> Iterator[dict[str, Any]]:
    """Colours and markers that can be distinguished in grey."""
    for colour, marker in zip(cycle((*PALETTE, "black", "0.5")), cycle(MARKERS)):
        yield {"color": colour, "marker": marker}


def _curves(axes: Any, medians: Mapping[str, Run], looks: Mapping[str, Any], target: float) -> None:
    for label, run in medians.items():
        look = looks[label.removeprefix(f"{PEER} ")]
        dashed = {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2}
        shown = {**look, **(dashed if _is_peer(label) else {"linestyle": "-", "linewidth": 1.6})}
        x, y = [row[0] for row in run["curve"]], [100 * row[2] for row in run["curve"]]
        axes.plot(x, y, label=title(label), markersize=4.5, markevery=max(1, len(x) // 6), **shown)
    axes.axhline(100 * target, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of meta-training")
    axes.set_ylabel("accuracy on validation classes (%)")


def _bars(
    axes: Any,
    runs: Mapping[str, Sequence[Run]],
    medians: Mapping[str, Run],
    looks: Mapping[str, Any],
    target: float,
) -> None:
    # The fastest on top, then those that have not reached the target, the most accurate first.
    order = sorted(medians, key=lambda label: (_rank(medians[label]), label))
    for place, label in enumerate(order):
        run, peer = medians[label], _is_peer(label)
        reached = run["seconds"] is not None
        bar = {
            "color": looks[label.removeprefix(f"{PEER} ")]["color"] if reached else "white",
            "alpha": 0.45 if reached and peer else 1.0,
            "hatch": "" if reached else "////",
            "edgecolor": "black" if reached else GREY,
            "linestyle": "--" if peer else "-",
        }
        axes.barh(place, _spent(run), height=0.6, **bar)
        times = [each["seconds"] for each in runs[label] if each["seconds"] is not None]
        axes.plot(
            times, [place] * len(times), linestyle="", marker="d", markersize=5, color="black", markerfacecolor="white"
        )
        text = _seconds(run["seconds"]) if reached else _failure(run)
        axes.annotate(
            f" {text}",
            (max([_spent(run), *times]), place),
            fontsize=8,
            va="center",
            xytext=(3, 0),
            textcoords="offset points",
        )
    axes.set_yticks(range(len(order)), [title(label) for label in order], fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    # Room for the label of the longest bar.
    axes.set_xlim(0, 1.75 * max([1e-3, *(_spent(run) for found in runs.values() for run in found)]))
    axes.set_xlabel(f"seconds of meta-training to {100 * target:g} %")


def _rank(run: Run) -> tuple[float, float]:
    return math.inf if run["seconds"] is None else run["seconds"], -_best(run)


def _best(run: Run) -> float:
    return max((row[2] for row in run["curve"]), default=0.0)


def _spent(run: Run) -> float:
    return run["curve"][-1][0] if run["curve"] else 0.0


def _failure(run: Run) -> str:
    if not run["curve"]:
        return f"not finite: {run['ended'].partition(':')[0]}"
    return f"not reached, best {100 * _best(run):.1f} %{' (ended)' if run['ended'] else ''}"


def _setting(value: Mapping[str, Any]) -> str:
    """The settings common to all methods."""
    count = len(value["seeds"])
    seeds = "one seed" if count == 1 else f"the median of {count} seeds"
    threads = "one thread" if value["threads"] == 1 else f"{value['threads']} threads"
    return (
        f"{seeds}, {threads}, at most {value['most_iterations']:,} meta-iterations; outside the clock "
        f"a validation on {value['validation_tasks']:,} tasks every {value['validate_every']} of them"
    )


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
