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
from pathlib import Path
from time import perf_counter

import torch

from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.device_timing import Floor, measure_floor
from kfo_ext.bench.measure import contenders, time_eager, time_graph, time_host, verified
from kfo_ext.bench.orders import packed_already, truth
from kfo_ext.bench.points import GROUPS as ALL_GROUPS
from kfo_ext.bench.providers import PROVIDERS, Provider, kfo_gradients_on
from kfo_ext.bench.result import facts_of, write_result
from kfo_ext.bench.timing import Timing
from kfo_ext.ops import library
from kfo_ext.problems import Problems

GROUPS = {name: ALL_GROUPS[name] for name in ("CNN(2)", "CNN(4)", "conv_64", "head_5x1600")}
CONTENDERS = {
    "kfo native packed": PROVIDERS["native"],
    "kfo triton packed": PROVIDERS["triton"],
    "kfo gradients on": Provider(kfo_gradients_on, packed_already, ours=True, saves=False),
    "kfo lists": PROVIDERS["lists"],
    "torch matmul": PROVIDERS["torch-matmul"],
    "torch formulas": PROVIDERS["torch-formulas"],
    "torch compiled": PROVIDERS["torch-formulas-compile"],
    "learn2learn": PROVIDERS["learn2learn"],
    "jax": PROVIDERS["jax"],
}
# Compiling takes far longer than timing: for the first count of tasks alone.
COMPILED = tuple(name for name, provider in CONTENDERS.items() if provider.compiled)
Row = dict[str, object]


def is_ours(name: str) -> bool:
    return name.startswith("kfo")


def measure(group: str, tasks: int, floor: Floor, options: argparse.Namespace) -> list[Row]:
    """The rows of one group: every order, mode and provider."""
    problems, device = GROUPS[group], torch.device(options.device)
    case = random_case(problems, tasks, torch.float32, device)
    expected = truth(case)
    made = {
        name: f"left out: compiled for {options.tasks[0]} tasks alone"
        for name in options.providers
        if name in COMPILED and tasks != options.tasks[0]
    }
    made |= contenders(CONTENDERS, [name for name in options.providers if name not in made], case)
    rows = []
    for order in ORDERS:
        where = {"group": group, "tasks": tasks, "order": order}
        good, reasons = verified(CONTENDERS, made, order, case, expected)
        rows += [where | {"provider": name, "mode": "eager", "status": reason} for name, reason in reasons.items()]
        errors = {contender.name: contender.error for contender in good}
        on_cuda, repeats, seconds = device.type == "cuda", options.repeats, options.seconds
        modes: dict[str, dict[str, Timing | str]] = {"eager": time_eager(CONTENDERS, good, on_cuda, repeats, seconds)}
        if on_cuda:
            modes["host"] = time_host(CONTENDERS, good, repeats)
            modes["graph"] = time_graph(CONTENDERS, good, modes["eager"], repeats, seconds)
        for mode, timings in modes.items():
            peers = [t.median for name, t in timings.items() if isinstance(t, Timing) and not is_ours(name)]
            for name, timing in timings.items():
                saved = CONTENDERS[name].reads_saved(order, case)
                row = where | {"provider": name, "mode": mode, "saved": saved, "error": errors[name]}
                if isinstance(timing, str):
                    rows.append(row | {"status": timing})
                else:
                    rows.append(
                        row | {"status": "ok"} | numbers(problems, row, timing, floor, min(peers, default=None))
                    )
    return rows


def numbers(problems: Problems, row: Row, timing: Timing, floor: Floor, best_peer: float | None) -> Row:
    """What a timing says, by the cost model of `csrc/plan.h` for float32 and a factor per task.

    Of a row that reads what an order before has saved, the model says no operations and no floor.

    best_peer: median seconds of the fastest other library in this mode, if there is one
    """
    plan = importlib.import_module("kfo_ext._plan")
    order, tasks = ORDERS.index(row["order"]) + 1, row["tasks"]
    moved, work = plan.bytes(problems.flat, tasks, order, tasks, 4), plan.flops(problems.flat, tasks, order)
    out: Row = {"seconds": timing._asdict()}
    if row["mode"] != "host":
        out["gb_per_s"] = moved / timing.median / 1e9
        if not row["saved"]:
            out["gflop_per_s"] = work / timing.median / 1e9
            out["times_floor"] = timing.median / floor.seconds(row["mode"], moved)
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
    """A markdown table of all rows; `+` marks a provider that reads what an order before has saved."""
    head = ("group", "tasks", "order", "mode", "provider", "median us", "20 % .. 80 %", "GB/s", "GFLOP/s", "x floor")
    head = (*head, "best peer / this")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row[key]) for key in ("group", "tasks", "order", "mode", "provider")]
        cells[-1] += " +" if row.get("saved") else ""
        if row["status"] != "ok":
            cells += [str(row["status"]).replace("|", "/"), *[""] * 5]
        else:
            median, low, high = (1e6 * row["seconds"][key] for key in ("median", "low", "high"))
            cells += [f"{median:.1f}", f"{low:.1f} .. {high:.1f}"]
            for key in ("gb_per_s", "gflop_per_s", "times_floor", "best_peer_over_this"):
                cells.append(f"{row[key]:.{2 if key.startswith(('times', 'best')) else 0}f}" if key in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small group, few repeats, nothing compiled")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tasks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--providers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=15, help="rounds per order")
    parser.add_argument("--seconds", type=float, default=0.004, help="length of one sample")
    parser.add_argument("--budget", type=float, help="seconds after which no further group is begun")
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
    started, device, facts = perf_counter(), torch.device(options.device), facts_of(options)
    floor = measure_floor(device, options.repeats, options.seconds)
    launches = ", ".join(f"{mode} {1e6 * seconds:.2f} us" for mode, seconds in floor.launch.items())
    print(f"floor: copy {floor.bandwidth / 1e9:.0f} GB/s; smallest operation: {launches}\n")
    facts |= {"backends": library.status(), "floor": floor._asdict()}
    rows: list[Row] = []
    for tasks in options.tasks:
        for group in options.groups:
            if options.budget is not None and perf_counter() - started > options.budget:
                rows.append({"group": group, "tasks": tasks, "order": "", "provider": "", "mode": ""})
                rows[-1]["status"] = f"left out: the budget of {options.budget:.0f} s is spent"
                continue
            rows += measure(group, tasks, floor, options)
            print(f"{table([row for row in rows if (row['group'], row['tasks']) == (group, tasks)])}\n", flush=True)
            if options.out:
                write_result(options.out, facts | {"worst": worst(rows), "rows": rows})
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
