"""Writes the pictures of results/speed.md and of the README, as SVG, from the committed result files alone.

python docs/make_pictures.py

The same results give the same bytes with the same matplotlib, whose version each file names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import DOCS, METHODS, NETWORKS, PEERS, by_contender, newest, result
from speed_tables import LOOPS

from experiments.registry import ENTRIES
from experiments.report import BUDGET
from experiments.report.outcomes import Book
from experiments.report.pictures import Line, over_seeds
from experiments.store import RESULTS
from experiments.svg import GRID, styled, svg
from kfo_ext.runs.files import atomic_write
from kfo_ext.runs.plots import PALETTE

FOLDER = DOCS / "pictures"
# Large enough to read at half of the size.
STYLE: dict[str, Any] = {**GRID, "axes.axisbelow": True, "font.size": 13, "axes.titlesize": 13, "hatch.linewidth": 0.8}
WIDTH = 9.6
# Light and dark fills, which hatches tell apart in grey too.
LOOKS: dict[str, dict[str, Any]] = {
    "kfo": {"color": PALETTE[0], "hatch": ""},
    "maml": {"color": "white", "edgecolor": PALETTE[1], "hatch": "///"},
}
CURVES: dict[str, dict[str, Any]] = {
    "kfo": {"color": PALETTE[0], "linestyle": "-", "marker": "o"},
    "maml": {"color": PALETTE[1], "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
}
ENTRY = {"kfo": "omniglot-cnn2-kfo-decayed", "maml": "omniglot-cnn2-maml"}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "ours_user": ("kfo_ext, vmap", {"color": PALETTE[0], "marker": "o"}),
    "ours_user_loop": ("kfo_ext, loop", {"color": PALETTE[2], "marker": "^"}),
    "learn2learn": ("learn2learn", {"color": PALETTE[1], "marker": "s", "markerfacecolor": "white"}),
}


def meta_iteration() -> bytes:
    """How much longer a meta-iteration takes in each other package."""
    with styled(**STYLE):
        figure = _figure(4.4)
        _speed_ups(figure.subplots())
        return svg(figure)


def readme(results: Path = RESULTS) -> bytes:
    """Accuracy over meta-iterations beside the speed-ups, as SVG.

    Args:
        results: folder of the experiments.

    Returns:
        The bytes of the SVG file.
    """
    with styled(**STYLE):
        figure = _figure(4.4)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _accuracy(left, lines(results))
        _speed_ups(right)
        return svg(figure)


def lines(results: Path) -> dict[str, tuple[Line, int]]:
    """By method, the validations of its tuned final runs over their seeds, and how many there are; none without any."""
    # The decayed runs take the setting of the tuned ones.
    names = {name: ENTRIES[name] for name in ("omniglot-cnn2-kfo", *ENTRY.values())}
    book = Book.read(names, BUDGET, results)
    records = {method: list(book.row(name).records.values()) for method, name in ENTRY.items()}
    return {method: (line, len(found)) for method, found in records.items() if (line := over_seeds(found))}


def _accuracy(axes: Any, found: Mapping[str, tuple[Line, int]]) -> None:
    for method, (line, seeds) in found.items():
        look = CURVES[method]
        label = f"{METHODS[method]} ({seeds} {'seed' if seeds == 1 else 'seeds'})"
        axes.plot(line.x, _percents(line.y), label=label, linewidth=2, markersize=6, markevery=0.15, **look)
        axes.fill_between(
            line.x, _percents(line.low), _percents(line.high), color=look["color"], alpha=0.2, linewidth=0
        )
    axes.set_title("5-way 5-shot Omniglot, CNN(2)")
    axes.set_xlabel("meta-iterations")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_ylim(top=100)
    if found:
        axes.legend(loc="lower right", fontsize=12)


def _percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _speed_ups(axes: Any) -> None:
    found = newest()
    shown = [method for method in METHODS if any(each.ours["method"] == method for each in found)]
    place, ticks = 0.0, []
    for method in shown:
        rows = [each for each in found if each.ours["method"] == method]
        for number, each in enumerate(rows):
            axes.barh(place, each.ratio, height=0.7, label="" if number else METHODS[method], **LOOKS[method])
            _value(axes, each.ratio, place, f"{each.ratio:.1f}x")
            ticks.append((place, PEERS[each.peer]))
            place += 1
        place += 0.6
    axes.set_yticks(*zip(*ticks))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color="black", linewidth=1.5, linestyle=":")
    # Room for the legend beside the longest bar.
    axes.set_xlim(0, 1.45 * max((each.ratio for each in found), default=1))
    axes.set_title("Speed-up of kfo_ext, meta-iteration")
    axes.set_xlabel("time of the package / time of kfo_ext")
    axes.legend(loc="lower right", fontsize=12)


def own_networks() -> bytes:
    """A meta-iteration of networks of plain torch.nn modules, by each route and by learn2learn."""
    rows: list[tuple[str, dict[str, float]]] = []
    for path in ("bench/results/user_cnn.json", "bench/results/user_networks.json"):
        for network, found in by_contender(path)[1].items():
            rows.append((NETWORKS[network], {name: found[name]["seconds"]["median"] for name in SIDES}))
    with styled(**STYLE):
        figure = _figure(3.9)
        axes = figure.subplots()
        for place, (_, seconds) in enumerate(rows):
            axes.plot(
                [1000 * min(seconds.values()), 1000 * max(seconds.values())], [place, place], color="0.6", zorder=1
            )
        for name, (label, look) in SIDES.items():
            times = [1000 * seconds[name] for _, seconds in rows]
            axes.plot(times, range(len(rows)), linestyle="", label=label, markersize=10, markeredgewidth=1.5, **look)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xscale("log")
        low, high = (1000 * of(seconds[name] for _, seconds in rows for name in SIDES) for of in (min, max))
        axes.set_xlim(0.8 * low, 1.25 * high)
        marks = [mark * 10**power for power in range(7) for mark in (1, 2, 5)]
        ticks = [mark for mark in marks if 0.8 * low <= mark <= 1.25 * high]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("time of a meta-iteration (ms, log axis)")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return svg(figure)


def loops() -> bytes:
    """A meta-iteration in the user's own loop."""
    rows = {row["contender"]: row["seconds"]["median"] for row in result("bench/results/meta_peers_loops.json")["rows"]}
    names = [name for name in LOOPS if name in rows]
    with styled(**STYLE):
        figure = _figure(4.6)
        axes = figure.subplots()
        for place, name in enumerate(names):
            # Hatched what runs on the convolutions and batch norms of this package.
            fast = name.endswith("fast_layers") or name.startswith("ours")
            look = {"color": "white", "edgecolor": PALETTE[0], "hatch": "///"} if fast else {"color": PALETTE[1]}
            axes.barh(place, 1000 * rows[name], height=0.7, **look)
            _value(axes, 1000 * rows[name], place, f"{1000 * rows[name]:,.0f}")
        axes.set_yticks(range(len(names)), [LOOPS[name].replace("`", "") for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1100 * max(rows.values()))
        axes.set_xlabel("time of a meta-iteration (ms)")
        return svg(figure)


def method_cost() -> bytes:
    """The time of a meta-iteration of every method."""
    rows = result("bench/results/method_cost.json")["rows"]
    with styled(**STYLE):
        figure = _figure(5.2)
        axes = figure.subplots()
        for place, row in enumerate(rows):
            look = LOOKS["kfo" if row["method"].startswith("KFO") else "maml"]
            axes.barh(place, row["over_maml"], height=0.7, **look)
            _value(axes, row["over_maml"], place, f"{row['over_maml']:.2f}")
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.axvline(1, color="black", linewidth=1.5, linestyle=":")
        axes.set_xlim(0, 1.1 * max(row["over_maml"] for row in rows))
        axes.set_xlabel("time of a meta-iteration / MAML's (dotted: 1)")
        return svg(figure)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _value(axes: Any, x: float, place: float, text: str) -> None:
    axes.annotate(text, (x, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=12)


def pictures() -> dict[Path, bytes]:
    """Every picture, by its file."""
    return {
        FOLDER / "readme.svg": readme(),
        FOLDER / "speed-meta-iteration.svg": meta_iteration(),
        FOLDER / "speed-own-networks.svg": own_networks(),
        FOLDER / "speed-loops.svg": loops(),
        FOLDER / "speed-methods.svg": method_cost(),
    }


if __name__ == "__main__":
    for path, content in pictures().items():
        with atomic_write(path) as file:
            file.write(content)
