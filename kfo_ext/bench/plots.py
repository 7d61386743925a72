"""Pictures of a results.json: time along each axis, and the rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from kfo_ext.bench.cases import ORDERS
from kfo_ext.bench.points import AXES
from kfo_ext.bench.providers import PROVIDERS
from kfo_ext.bench.result import Row
from kfo_ext.runs.files import atomic_write
from kfo_ext.runs.plots import PALETTE

MARKERS = "os^vDPX*<>"
DPI = 90
COLOURS = 48


def draw(result: Row, folder: Path, prefix: str = "") -> list[Path]:
    """Draw everything that a result holds; the PNG files written.

    result: a results.json
    prefix: start of the files' names
    """
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    # Replay of a graph where there is one: the time on the device itself.
    mode = "graph" if any(row["mode"] == "graph" for row in rows) else "eager"
    title = _machine(result) + (", replayed from a CUDA graph" if mode == "graph" else "")
    rows = [row for row in rows if row["mode"] == mode]
    styles = _styles(result["rows"])
    written = []
    for axis in AXES:
        along = [row for row in rows if row["axis"] == axis]
        group = along[0]["group"] if along else None
        if axis != "layers":
            along = [row for row in along if row["group"] == group]
        if len({row["x"] for row in along}) > 1:
            name = title if axis in ("layers", "width") else f"{title}, {group}"
            written.append(_save(_time(along, axis, styles, name), folder / f"{prefix}time-{axis}.png"))
    if any(row["ours"] for row in rows) and result["roofs"]["gflop_per_s"]:
        written.append(_save(_roofline(rows, result["roofs"], title), folder / f"{prefix}roofline.png"))
    return written


def _machine(result: Row) -> str:
    on_cuda = result["settings"]["device"] == "cuda"
    return f"{result['device']}" if on_cuda else f"{result['processor']}, {result['torch_threads']} threads"


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Colour and marker of every provider, ours in full and thicker lines."""
    found = dict.fromkeys((row["provider"], row["ours"]) for row in rows if row["provider"])
    # Always in one order, so that a provider looks the same in every picture.
    known = list(PROVIDERS)
    names = sorted(found, key=lambda pair: known.index(pair[0]) if pair[0] in known else len(known))
    return {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "-" if ours else ("--", ":")[i // len(PALETTE) % 2],
            "linewidth": 2 if ours else 1,
            "markersize": 5,
            "label": f"kfo_ext {name}" if ours else name,
        }
        for i, (name, ours) in enumerate(names)
    }


def _figure(columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns + 1.8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _time(rows: Sequence[Row], axis: str, styles: dict, title: str):
    orders = [order for order in ORDERS if any(row["order"] == order for row in rows)]
    figure, panels = _figure(len(orders))
    for panel, order in zip(panels, orders):
        for name, style in styles.items():
            curve = sorted((r["x"], r["median_s"]) for r in rows if (r["order"], r["provider"]) == (order, name))
            if curve:
                panel.plot(*zip(*curve), **style)
        panel.set_yscale("log")
        ticks = sorted({row["x"] for row in rows})
        if min(ticks) > 0:
            panel.set_xscale("log")
        panel.set_xticks(ticks, [str(x) for x in ticks])
        panel.minorticks_off()
        panel.set_title(order.replace("_", " "), fontsize=10)
        panel.set_xlabel(AXES[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of one call")
    _legend(figure, panels)
    figure.suptitle(title, fontsize=10)
    return figure


def _roofline(rows: Sequence[Row], roofs: Row, title: str):
    """Our kernels and the fastest plain torch, a point for each group of the axes tasks, layers and width."""
    orders = [order for order in ORDERS if any(row["order"] == order for row in rows)]
    figure, panels = _figure(len(orders))
    # What reads saved intermediates has no rate of its own.
    rated = [row for row in rows if row["gflop_per_s"] is not None]
    kernels = [row for row in rated if row["axis"] in ("tasks", "layers", "width")]
    ours = next(
        (name for name in ("native", "triton", "reference") if any(r["provider"] == name for r in kernels)), None
    )
    torch_alone = [row for row in kernels if str(row["provider"]).startswith("torch-")]
    for panel, order in zip(panels, orders):
        points = {"ours": [row for row in kernels if (row["provider"], row["order"]) == (ours, order)], "torch": []}
        for at in dict.fromkeys((row["axis"], row["x"], row["group"]) for row in kernels):
            peers = [row for row in torch_alone if (row["axis"], row["x"], row["group"], row["order"]) == (*at, order)]
            points["torch"] += [min(peers, key=lambda row: row["median_s"])] if peers else []
        # Results older than that column have a rate for all.
        which = "\nthat reads nothing saved" if any("saved" in row for row in rows) else ""
        looks = {
            "ours": (f"kfo_ext {ours}", PALETTE[0], "o"),
            "torch": (f"the fastest plain torch{which}", PALETTE[1], "x"),
        }
        for kind, (label, colour, marker) in looks.items():
            where = [(row["flops"] / row["bytes"], row["gflop_per_s"]) for row in points[kind]]
            if where:
                panel.scatter(*zip(*where), color=colour, marker=marker, s=24, label=label, zorder=3)
        _label(panel, points["ours"])
        xs = [row["flops"] / row["bytes"] for row in kernels] or [1.0]
        ridge = roofs["gflop_per_s"] / roofs["gb_per_s"]
        line = sorted({min(xs) / 2, ridge, max(*xs, ridge) * 2})
        heights = [min(roofs["gflop_per_s"], x * roofs["gb_per_s"]) for x in line]
        panel.plot(line, heights, color="black", linewidth=1, label="multiply-adds, copy bandwidth")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(order.replace("_", " "), fontsize=10)
        panel.set_xlabel("FLOPs per byte that must move")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("GFLOP/s")
    _legend(figure, panels)
    figure.suptitle(f"{title}; roofs {roofs['gflop_per_s']:.0f} GFLOP/s, {roofs['gb_per_s']:.0f} GB/s", fontsize=10)
    return figure


def _label(panel, rows: Sequence[Row]) -> None:
    for row in rows:
        name = {"width": f"p=q={row['x']}", "layers": row["group"]}.get(row["axis"])
        if name:
            panel.annotate(
                name, (row["flops"] / row["bytes"], row["gflop_per_s"]), xytext=(3, 3),
                textcoords="offset points", fontsize=6,
            )  # fmt: skip


def _legend(figure, panels) -> None:
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=7, frameon=False)


def _save(figure, path: Path) -> Path:
    from PIL import Image

    whole = BytesIO()
    figure.savefig(whole, format="png", dpi=DPI)
    with atomic_write(path) as file:
        # Few colours, so that a repository can hold the pictures.
        Image.open(whole).convert("RGB").quantize(COLOURS).save(file, format="PNG", optimize=True)
    return path
