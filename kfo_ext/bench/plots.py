"""Pictures of a results.json: time along each axis, and the rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
# Legible at half size.
FONT = 13
# The marker of each axis in the roofline: full for this package, open for plain torch.
SHAPES = {"tasks": "o", "layers": "s", "width": "^"}
# Positions of a point's name: horizontal alignment and offset in points, the preferred ones first.
SIDES = (("left", 9, -8), ("right", -9, 8), ("center", 0, -18), ("right", -9, -8), ("left", 9, 8), ("center", 0, 18))
# More tick labels than this are rotated.
LEVEL_TICKS = 5


def draw(result: Row, folder: Path, prefix: str = "") -> list[Path]:
    """Draw everything in a result.

    Args:
        result: a results.json.
        folder: where to write the pictures.
        prefix: start of the files' names.

    Returns:
        The PNG files written.
    """
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    # Graph replay if there is one: the time on the device itself.
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


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every provider; kfo_ext has full markers and thicker lines."""
    found = dict.fromkeys((row["provider"], row["ours"]) for row in rows if row["provider"])
    # A fixed order, so that a provider looks the same in every picture.
    known = list(PROVIDERS)
    names = sorted(found, key=lambda pair: known.index(pair[0]) if pair[0] in known else len(known))
    return {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "-" if ours else ("--", ":")[i // len(PALETTE) % 2],
            "linewidth": 2.5 if ours else 1,
            "markersize": 7,
            # Open markers distinguish the others from this package in grey.
            "markerfacecolor": PALETTE[i % len(PALETTE)] if ours else "white",
            "label": f"kfo_ext {name}" if ours else name,
        }
        for i, (name, ours) in enumerate(names)
    }


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8 * columns + 1, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _time(rows: Sequence[Row], axis: str, styles: dict[str, dict[str, Any]], title: str) -> Any:
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
        panel.set_xticks(ticks, [str(x) for x in ticks], rotation=0 if len(ticks) <= LEVEL_TICKS else 45)
        panel.minorticks_off()
        _name(panel, order, AXES[axis])
    panels[0].set_ylabel("time of a call (s)", fontsize=FONT)
    _legend(figure, panels)
    figure.suptitle(title, fontsize=FONT)
    return figure


def _name(panel: Any, order: str, x: str) -> None:
    panel.set_title(order.replace("_", " "), fontsize=FONT)
    panel.set_xlabel(x if len(x) < 32 else x.replace(", ", ",\n"), fontsize=FONT)
    panel.tick_params(labelsize=FONT - 2)
    panel.grid(alpha=0.3)


def _roofline(rows: Sequence[Row], roofs: Row, title: str) -> Any:
    """The kernels of kfo_ext and the fastest plain torch: a point per group of the axes tasks, layers and width."""
    orders = [order for order in ORDERS if any(row["order"] == order for row in rows)]
    figure, panels = _figure(len(orders))
    # A provider that reads saved intermediates has no rate of its own.
    rated = [row for row in rows if row["gflop_per_s"] is not None]
    kernels = [row for row in rated if row["axis"] in SHAPES]
    ours = next(
        (name for name in ("native", "triton", "reference") if any(r["provider"] == name for r in kernels)), None
    )
    torch_alone = [row for row in kernels if str(row["provider"]).startswith("torch-")]
    # Results without that column have a rate for all.
    which = " that reads nothing saved" if any("saved" in row for row in rows) else ""
    looks = {
        "ours": (f"kfo_ext {ours}", {"facecolor": PALETTE[0], "edgecolor": PALETTE[0]}),
        "torch": (f"fastest plain torch{which}", {"facecolor": "none", "edgecolor": PALETTE[1]}),
    }
    for panel, order in zip(panels, orders):
        points = {"ours": [row for row in kernels if (row["provider"], row["order"]) == (ours, order)], "torch": []}
        for at in dict.fromkeys((row["axis"], row["x"], row["group"]) for row in kernels):
            peers = [row for row in torch_alone if (row["axis"], row["x"], row["group"], row["order"]) == (*at, order)]
            points["torch"] += [min(peers, key=lambda row: row["median_s"])] if peers else []
        for kind, (label, look) in looks.items():
            for axis, marker in SHAPES.items():
                where = [_place(row) for row in points[kind] if row["axis"] == axis]
                if where:
                    panel.scatter(
                        *zip(*where),
                        marker=marker,
                        s=60,
                        linewidth=1.5,
                        zorder=3,
                        **look,
                        label=f"{label}: {AXES[axis]}",
                    )
        xs = [row["flops"] / row["bytes"] for row in kernels] or [1.0]
        ridge = roofs["gflop_per_s"] / roofs["gb_per_s"]
        line = sorted({min(xs) / 2, ridge, max(*xs, ridge) * 2})
        heights = [min(roofs["gflop_per_s"], x * roofs["gb_per_s"]) for x in line]
        panel.plot(line, heights, color="black", linewidth=1.5, label="multiply-add peak, copy bandwidth")
        panel.set_xscale("log")
        panel.set_yscale("log")
        _name(panel, order, "FLOPs per byte that must move")
    panels[0].set_ylabel("GFLOP/s", fontsize=FONT)
    _legend(figure, panels, columns=2)
    figure.suptitle(f"{title}; roofs {roofs['gflop_per_s']:.0f} GFLOP/s, {roofs['gb_per_s']:.0f} GB/s", fontsize=FONT)
    for panel, order in zip(panels, orders):
        widths = [row for row in kernels if (row["provider"], row["order"], row["axis"]) == (ours, order, "width")]
        _label(figure, panel, {f"p = {row['x']}": _place(row) for row in widths})
    return figure


def _place(row: Row) -> tuple[float, float]:
    return row["flops"] / row["bytes"], row["gflop_per_s"]


def _label(figure: Any, panel: Any, names: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, if it fits in the panel without overlapping points, lines or names."""
    figure.draw_without_rendering()
    points = [at for drawn in panel.collections for at in panel.transData.transform(drawn.get_offsets())]
    roofs = [line.get_transform().transform_path(line.get_path()) for line in panel.lines]
    taken: list[Any] = []
    for name, at in names.items():
        for side, x, y in SIDES:
            text = panel.annotate(
                name, at, xytext=(x, y), textcoords="offset points", fontsize=FONT - 2, ha=side, va="center"
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            within = all(panel.bbox.contains(*corner) for corner in box.corners())
            free = not box.count_overlaps(taken) and not any(roof.intersects_bbox(box, filled=False) for roof in roofs)
            if within and free and not box.padded(4).count_contains(points):
                taken.append(box)
                break
            text.remove()


def _legend(figure: Any, panels: Any, columns: int = 4) -> None:
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", fontsize=FONT - 1, frameon=False, ncols=columns
    )


def _save(figure: Any, path: Path) -> Path:
    import matplotlib
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    whole, facts = BytesIO(), PngInfo()
    figure.savefig(whole, format="png", dpi=DPI)
    # Reproducible: the same result and version give the same picture.
    facts.add_text("Software", f"Matplotlib {matplotlib.__version__}")
    with atomic_write(path) as file:
        # Few colours, so that a repository can hold the pictures.
        Image.open(whole).convert("RGB").quantize(COLOURS).save(file, format="PNG", optimize=True, pnginfo=facts)
    return path
