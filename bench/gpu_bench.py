"""The three orders on a GPU, by every provider, eager and replayed from a CUDA graph, against the device's floor.

    python bench/gpu_bench.py --out gpu_bench.json
    python bench/gpu_bench.py --device cpu --quick        a few seconds, wall clock alone: exercises the code

A provider is compared with float64 truth before it is timed; where it fails, its row says so and holds no number.
Operands stay the same from call to call, so that small groups are read from the device's cache by everybody. JAX is
timed by the wall clock, everything else on a GPU by events; all of one order are interleaved.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from device_timing import Floor, captured, events, host, measure_floor, per_call
from formula_orders import torch_compiled, torch_formulas
from jax_orders import jax_vmap, packed_from_jax
from timing import Timing, environment, interleaved, wall_clock
from transform_orders import (
    ORDERS,
    PROVIDERS,
    Case,
    Orders,
    Provider,
    error_of,
    kfo_gradients_on,
    kfo_packed,
    packed_already,
    random_case,
)

from kfo_ext.models import omniglot_cnn
from kfo_ext.testing import truth
from kfo_ext.transform import Problems, native

# As parameters: learn2learn knows layers by their dimensions.
GROUPS = {
    "CNN(2)": Problems.of(omniglot_cnn(2).parameters()),
    "CNN(4)": Problems.of(omniglot_cnn(4).parameters()),
    "conv_64": Problems.of([torch.empty(64, 64, 3, 3, device="meta")]),
    "head_5x1600": Problems.of([torch.empty(5, 1600, device="meta")]),
}
CONTENDERS = {
    "kfo native packed": PROVIDERS["kfo packed"],
    "kfo triton packed": Provider(lambda case: kfo_packed(case, "triton"), packed_already),
    "kfo gradients on": Provider(kfo_gradients_on, packed_already),
    "kfo lists": PROVIDERS["kfo lists"],
    "torch matmul": PROVIDERS["torch matmul"],
    "torch formulas": Provider(torch_formulas),
    "torch compiled": Provider(torch_compiled),
    "learn2learn": PROVIDERS["learn2learn"],
    "jax": Provider(jax_vmap, packed_from_jax),
}
# Compiling takes far longer than timing: for the first count of tasks alone.
COMPILED = ("torch compiled", "jax")
# Outside torch's streams: no events, no capture by torch.
WALL_CLOCK = ("jax",)
# Thousands of launches a call: a graph of them says nothing about anybody's use.
EAGER_ALONE = ("jax", "learn2learn")
TOLERANCE = 1e-4
Row = dict[str, object]


class Contender(NamedTuple):
    """A provider whose outputs of an order are verified."""

    name: str
    call: Callable[[], object]
    error: float


def is_ours(name: str) -> bool:
    return name.startswith("kfo")


def contenders(names: Iterable[str], case: Case, tasks: int, first_tasks: int) -> dict[str, Orders | str]:
    """The orders of every provider that runs here, or the reason why it does not."""
    made: dict[str, Orders | str] = {}
    for name in names:
        if name in COMPILED and tasks != first_tasks:
            made[name] = f"left out: compiled for {first_tasks} tasks alone"
            continue
        try:
            made[name] = CONTENDERS[name].make(case)
        except Exception as error:  # whatever it is, it is the finding
            made[name] = f"does not run: {type(error).__name__}: {_line(error)}"
    return made


def verified(
    made: dict[str, Orders | str], order: str, case: Case, expected: dict[str, torch.Tensor]
) -> tuple[list[Contender], dict[str, str]]:
    """Those whose outputs of one order are right, and why the others are not timed."""
    good, reasons = [], {}
    for name, orders in made.items():
        if isinstance(orders, str):
            reasons[name] = orders
            continue
        try:
            error = error_of(CONTENDERS[name], order, orders[order](), case, expected)
        except Exception as failure:  # as above
            reasons[name] = f"failed: {type(failure).__name__}: {_line(failure)}"
            continue
        if error <= TOLERANCE:
            good.append(Contender(name, orders[order], error))
        else:
            reasons[name] = f"WRONG: relative error {error:.1e}, allowed {TOLERANCE:.0e}"
    return good, reasons


def time_order(good: list[Contender], on_cuda: bool, options: argparse.Namespace) -> dict[str, dict[str, Timing | str]]:
    """By mode and provider, the timing of one call, or why there is none."""
    names = {c.name: c.call for c in good}
    on_wall = {name: call for name, call in names.items() if name in WALL_CLOCK or not on_cuda}
    on_events = {name: call for name, call in names.items() if name not in on_wall}
    modes: dict[str, dict[str, Timing | str]] = {"eager": {}}
    for functions, sample in ((on_events, events), (on_wall, wall_clock)):
        if functions:
            modes["eager"] |= interleaved(functions, options.repeats, options.seconds, sample)
    if not on_cuda:
        return modes

    ours = {name: call for name, call in names.items() if is_ours(name)}
    if ours:
        modes["host"] = interleaved(ours, options.repeats, 2e-4, host)
    graphs, calls, modes["graph"] = {}, {}, {}
    for name, call in names.items():
        if name in EAGER_ALONE:
            continue
        # About 200 us a replay, so that launching the graph weighs little.
        calls[name] = min(20, max(1, math.ceil(2e-4 / modes["eager"][name].median)))
        try:
            graphs[name] = captured(call, calls[name])
        except Exception as error:  # as above
            modes["graph"][name] = f"not captured: {type(error).__name__}: {_line(error)}"
    timings = interleaved(graphs, options.repeats, options.seconds, events) if graphs else {}
    modes["graph"] |= {name: per_call(timing, calls[name]) for name, timing in timings.items()}
    return modes


def measure(group: str, tasks: int, floor: Floor, options: argparse.Namespace) -> list[Row]:
    """The rows of one group: every order, mode and provider."""
    problems, device = GROUPS[group], torch.device(options.device)
    case = random_case(problems, tasks, torch.float32, device)
    expected = truth(case.packed, problems.shapes)
    made = contenders(options.providers, case, tasks, options.tasks[0])
    rows = []
    for order in ORDERS:
        where = {"group": group, "tasks": tasks, "order": order}
        good, reasons = verified(made, order, case, expected)
        rows += [where | {"provider": name, "mode": "eager", "status": reason} for name, reason in reasons.items()]
        errors = {contender.name: contender.error for contender in good}
        for mode, timings in time_order(good, device.type == "cuda", options).items():
            peers = [t.median for name, t in timings.items() if isinstance(t, Timing) and not is_ours(name)]
            for name, timing in timings.items():
                row = where | {"provider": name, "mode": mode, "error": errors[name]}
                if isinstance(timing, str):
                    rows.append(row | {"status": timing})
                else:
                    rows.append(
                        row | {"status": "ok"} | numbers(problems, row, timing, floor, min(peers, default=None))
                    )
    return rows


def numbers(problems: Problems, row: Row, timing: Timing, floor: Floor, best_peer: float | None) -> Row:
    """What a timing says, by the cost model of `csrc/plan.h` for float32 and a factor per task.

    best_peer: median seconds of the fastest other library in this mode, if there is one
    """
    plan = importlib.import_module("kfo_ext._plan")
    order, tasks = ORDERS.index(row["order"]) + 1, row["tasks"]
    moved, work = plan.bytes(problems.flat, tasks, order, tasks, 4), plan.flops(problems.flat, tasks, order)
    out: Row = {"seconds": timing._asdict()}
    if row["mode"] != "host":
        out |= {
            "gb_per_s": moved / timing.median / 1e9,
            "gflop_per_s": work / timing.median / 1e9,
            "times_floor": timing.median / floor.seconds(row["mode"], moved),
        }
        if best_peer:
            out["best_peer_over_this"] = best_peer / timing.median
    return out


def worst(rows: list[Row]) -> Row | None:
    """Our native row that is furthest from the floor, replayed where that was measured."""
    for mode in ("graph", "eager"):
        ours = [
            row
            for row in rows
            if row["provider"] == "kfo native packed" and row["mode"] == mode and "times_floor" in row
        ]
        if ours:
            return max(ours, key=lambda row: row["times_floor"])
    return None


def table(rows: list[Row]) -> str:
    """A markdown table of all rows."""
    head = ("group", "tasks", "order", "mode", "provider", "median us", "20 % .. 80 %", "GB/s", "GFLOP/s", "x floor")
    head = (*head, "best peer / this")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row[key]) for key in ("group", "tasks", "order", "mode", "provider")]
        if row["status"] != "ok":
            cells += [str(row["status"]).replace("|", "/"), *[""] * 5]
        else:
            median, low, high = (1e6 * row["seconds"][key] for key in ("median", "low", "high"))
            cells += [f"{median:.1f}", f"{low:.1f} .. {high:.1f}"]
            for key in ("gb_per_s", "gflop_per_s", "times_floor", "best_peer_over_this"):
                cells.append(f"{row[key]:.{2 if key.startswith(('times', 'best')) else 0}f}" if key in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _line(error: Exception) -> str:
    return " ".join((str(error).splitlines() or [""])[0].split())[:120]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small group, few repeats, nothing compiled")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tasks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--providers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=15, help="rounds per order")
    parser.add_argument("--seconds", type=float, default=0.004, help="length of one sample")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further group is begun")
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after each group")
    options = parser.parse_args(arguments)
    if options.quick:
        options.groups, options.tasks, options.repeats, options.seconds = ["CNN(2)"], [2], 3, 5e-4
        options.providers = [name for name in options.providers if name not in COMPILED]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --quick exercises the code without one")
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """Measure, print and write everything; the rows."""
    started, device = perf_counter(), torch.device(options.device)
    floor = measure_floor(device, options.repeats, options.seconds)
    launches = ", ".join(f"{mode} {1e6 * seconds:.2f} us" for mode, seconds in floor.launch.items())
    print(f"floor: copy {floor.bandwidth / 1e9:.0f} GB/s; smallest operation: {launches}\n")
    facts = environment() | {"backends": native.status(), "floor": floor._asdict()}
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    rows: list[Row] = []
    for tasks in options.tasks:
        for group in options.groups:
            if perf_counter() - started > options.budget:
                rows.append({"group": group, "tasks": tasks, "order": "", "provider": "", "mode": ""})
                rows[-1]["status"] = f"left out: the budget of {options.budget:.0f} s is spent"
                continue
            rows += measure(group, tasks, floor, options)
            print(f"{table([row for row in rows if (row['group'], row['tasks']) == (group, tasks)])}\n", flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                result = facts | {"settings": settings, "worst": worst(rows), "rows": rows}
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} rows, {sum(row['status'] == 'ok' for row in rows)} of them measured")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """1 if a provider of ours gave wrong numbers, else 0."""
    options = parse(arguments)
    if options.device == "cuda":
        # Autograd differentiates on the stream of the forward call, and capture is not possible on the default one.
        with torch.cuda.stream(torch.cuda.Stream()):
            rows = run(options)
    else:
        rows = run(options)
    return int(any(is_ours(row["provider"]) and row["status"].startswith(("WRONG", "failed")) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
