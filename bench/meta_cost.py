"""Time and peak memory of kfo_ext's meta-iteration against its size: tasks, inner steps, layers, width.

    python bench/meta_cost.py --out meta_cost.json

One size changes at a time, the others stay fixed. Each axis gets the exponent fitted over the upper half of its sizes,
the cost ratio of a tenfold size if both were measured, and a flag for every step that costs more per doubling than
expected (see `STEEP`): a cliff. A table goes beside the JSON file as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.meta_case import METHODS, NETWORKS, Network, full_float32, make_case
from bench.meta_contenders import CONTENDERS
from bench.meta_memory import peak_memory
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.fits import cliffs, exponent, upper_half
from kfo_ext.bench.result import facts_of, provenance, write_result
from kfo_ext.bench.timing import interleaved
from kfo_ext.machine import keep_freed_memory

AXES = {
    "tasks": [1, 2, 4, 8, 16, 32, 64, 160],
    "steps": [1, 2, 3, 5, 10, 20, 50],
    "layers": [1, 2, 3, 4, 5, 6],
    "hidden": [8, 16, 32, 64, 128],
}
COSTS = ("seconds", "peak")
# The cost ratio of a doubling above which it is a cliff. All axes are linear except the width: convolutions grow with
# its square, Kronecker products with its cube.
STEEP = {"tasks": 2.5, "steps": 2.5, "layers": 2.5, "hidden": 5.0}
Sizes = dict[str, int]


def network_of(name: str, sizes: Sizes) -> Network:
    """The network of that name with the given layers and channels."""
    return replace(NETWORKS[name], layers=sizes["layers"], hidden=sizes["hidden"])


def measure_axis(axis: str, sizes: list[int], base: Sizes, options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure one point per size of the axis, all else as in `base`: seconds, their percentiles, bytes of memory."""
    points, functions = [{**base, axis: size} for size in sizes], {}
    for point in points:
        settings = {"tasks": point["tasks"], "steps": point["steps"], "lr": options.lr}
        case = make_case(network_of(options.network, point), options.method, device=options.device, **settings)
        functions[str(point[axis])] = CONTENDERS[options.method][options.contender](case).run
    timings = interleaved(functions, options.repeats, sample=finished)
    for point, timing in zip(points, timings.values(), strict=True):
        settings = {"tasks": point["tasks"], "steps": point["steps"], "lr": options.lr}
        memory = peak_memory(
            network_of(options.network, point), options.method, options.contender, options.device, **settings
        )
        point |= {"seconds": timing.median, "timing": timing._asdict(), "peak": memory["peak"], "memory": memory}
    return points


def growth_of(axis: str, points: list[dict[str, object]]) -> dict[str, object]:
    """Exponents and cliffs of the axis, for time and memory."""
    # A resident set may not have grown by a page: half a page replaces zero.
    costs = {
        cost: [(point[axis], max(point[cost], 2048 if cost == "peak" else 0)) for point in points] for cost in COSTS
    }
    tenfold = {
        cost: [(size, 10 * size, of[10 * size] / of[size]) for size in of if 10 * size in of]
        for cost, of in ((cost, dict(points)) for cost, points in costs.items())
    }
    return {
        "axis": axis,
        "tenfold": tenfold,
        "exponents": {cost: exponent(upper_half(costs[cost])) if len(points) > 1 else None for cost in COSTS},
        "cliffs": {cost: cliffs(costs[cost], STEEP[axis]) for cost in COSTS},
    }


def show(growth: dict[str, object], points: list[dict[str, object]], write: Callable[[str], None] = print) -> None:
    """Print one axis: its points, exponents and cliffs."""
    axis = growth["axis"]
    write(f"\n{axis:>8} {'median':>12} {'peak':>10}")
    for point in points:
        write(f"{point[axis]:8} {1e3 * point['seconds']:9.1f} ms {point['peak'] / 2**20:7.1f} MB")
    for cost in COSTS:
        k = growth["exponents"][cost]
        write(f"{cost} ~ {axis}^{'?' if k is None else format(k, '.2f')}")
        for size, larger, ratio in growth["tenfold"][cost]:
            write(f"{cost} x {ratio:.1f} from {axis} = {size} to {larger}")
        for before, after, ratio in growth["cliffs"][cost]:
            write(f"CLIFF: {cost} x {ratio:.2f} from {axis} = {before} to {after}")


def markdown(result: dict[str, object]) -> str:
    """One line per axis and cost: smallest to largest size, exponent, cost ratio of a tenfold size, cliffs."""
    settings = result["settings"]
    base = ", ".join(f"{axis} {settings[axis]}" for axis in AXES)
    lines = [
        f"Made by `python bench/{result['command']}` on {result['processor']}, torch {result['torch']}, "
        f"{result['torch_threads']} threads, {provenance(result)}; medians of {settings['repeats']} interleaved "
        f"repeats, freed memory {'kept' if result['keeps_freed_memory'] else 'given back'}; "
        f"{settings['network']}, {settings['method']}; where it is not the axis: {base}. A cliff is a step "
        f"that costs more per doubling than {', '.join(f'{steep} ({axis})' for axis, steep in STEEP.items())}.",
        "",
        "| axis | cost | sizes | from .. to | exponent | ten times the size | cliffs |",
        "|---|---|---|---|---|---|---|",
    ]
    units = {"seconds": (1e3, "ms"), "peak": (2**-20, "MB")}
    for axis in result["axes"]:
        points, name = axis["points"], axis["axis"]
        for cost in COSTS:
            factor, unit = units[cost]
            span = f"{factor * points[0][cost]:.0f} .. {factor * points[-1][cost]:.0f} {unit}"
            power = axis["exponents"][cost]
            tenfold = ", ".join(f"{a} to {b}: {ratio:.1f}x" for a, b, ratio in axis["tenfold"][cost])
            steep = ", ".join(f"{a} to {b}: {ratio:.1f}x" for a, b, ratio in axis["cliffs"][cost])
            lines.append(
                f"| {name} | {cost} | {points[0][name]} .. {points[-1][name]} | {span} | "
                f"{'' if power is None else format(power, '.2f')} | {tenfold} | {steep or 'none'} |"
            )
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """Measure the axes, print them and write the result; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--network", choices=NETWORKS, default="omniglot_cnn2", help="layers and channels aside")
    parser.add_argument("--limit", type=int, help="leave out sizes above it, on every axis")
    for axis, default in (("tasks", 16), ("steps", 5), ("layers", 2), ("hidden", 32)):
        parser.add_argument(f"--{axis}", type=int, default=default, help="where it is not the axis")
    parser.add_argument("--method", choices=METHODS, default="kfo")
    parser.add_argument("--contender", help="default: ours_native for kfo, ours for maml")
    parser.add_argument("--lr", type=float, default=0.1, help="inner learning rate; bears on no cost")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    options.contender = options.contender or {"kfo": "ours_native", "maml": "ours"}[options.method]
    if options.contender not in CONTENDERS[options.method]:
        parser.error(f"--contender: expected one of {', '.join(CONTENDERS[options.method])}, got {options.contender!r}")
    full_float32()
    facts = facts_of(options) | {"keeps_freed_memory": keep_freed_memory()}
    base, axes = {axis: getattr(options, axis) for axis in AXES}, []
    for axis in options.axes:
        sizes = [size for size in AXES[axis] if options.limit is None or size <= options.limit]
        points = measure_axis(axis, sizes, base, options)
        growth = growth_of(axis, points)
        show(growth, points)
        axes.append(growth | {"points": points})
    found = [f"{growth['axis']} ({cost})" for growth in axes for cost in COSTS if growth["cliffs"][cost]]
    print(f"\ncliffs: {', '.join(found) or 'none'}")
    if options.out:
        write_result(options.out, facts | {"axes": axes}, markdown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
