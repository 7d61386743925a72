"""The CPU's targets in one run: the transform's three orders on the paper's networks, and the host time of a call.

    python bench/cpu_targets.py --out bench/results/cpu_targets.json

writes that file and the table beside it as Markdown, in which the rows of the meta-iteration are read from
`--meta`, what bench/meta_peers.py wrote. Every contender is compared with float64 before it is timed, and all are timed
in turn. The kernels of AVX2 run in a process of their own, in the same rounds. The process keeps freed memory, for all
contenders alike: otherwise what one of them frees decides whether another's outputs are new pages in every call.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kfo_ext.bench import cost
from kfo_ext.bench.cases import ORDERS, Case, Form, parameter_leaves, random_case
from kfo_ext.bench.host import HOST_US, Empty, empty_call, operator_calls
from kfo_ext.bench.measure import contenders, verified
from kfo_ext.bench.orders import Orders, composed, through_autograd, truth
from kfo_ext.bench.points import GROUPS, TASKS, Point
from kfo_ext.bench.providers import PROVIDERS
from kfo_ext.bench.roofs import fma_rate
from kfo_ext.bench.timing import environment, interleaved, wall_clock
from kfo_ext.trainer.allocator import keep_freed_memory
from kfo_ext.trainer.files import read_json, write_json
from kfo_ext.transform import Problems, native

NETWORKS = ("CNN(2)", "CNN(4)")
PLAIN_TORCH = ("torch-matmul", "torch-einsum", "torch-formulas", "torch-compile", "torch-formulas-compile")
TIMED = ("native", "lists", *PLAIN_TORCH, "learn2learn")
AVX2, EMPTY = "native, avx2", "empty Function"
PACKING, LARGE, SMALL = "packing alone", "native, largest parameters alone", "native, other parameters alone"
FLOOR_SHARE = {"forward": 0.5, "backward": 0.3, "double_backward": 0.3}
# Threads wait actively for some milliseconds after a parallel region, on the core of the next contender.
PAUSE = 0.02  # s
Row = dict[str, object]


class OtherIsa:
    """The packed orders in a process of their own, whose kernels are of another instruction set."""

    def __init__(self, isa: str, group: str) -> None:
        command = [sys.executable, __file__, "--serve", group]
        self.process = subprocess.Popen(
            command, env=os.environ | {"KFO_CPU_ISA": isa}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if (said := self._line()) != isa:
            raise RuntimeError(f"the process for {isa} says {said!r}")

    def seconds(self, order: str, calls: int) -> float:
        """Seconds of one call, of so many in a row."""
        print(order, calls, file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        self.process.communicate()

    def _line(self) -> str:
        return self.process.stdout.readline().strip()


class Remote(NamedTuple):
    """One order of another process, in the place of a function to time."""

    isa: OtherIsa
    order: str


def sample(function: Callable[[], object] | Remote, calls: int) -> float:
    """Seconds of one call, of so many in a row, here or there; after a pause in which all threads go to sleep."""
    time.sleep(PAUSE)
    if isinstance(function, Remote):
        return function.isa.seconds(function.order, calls)
    return awake(function, calls)


def awake(function: Callable[[], object], calls: int) -> float:
    """The same without the pause, once some calls have woken threads and caches."""
    for _ in range(1 + calls // 4):
        function()
    return wall_clock(function, calls)


def serve(group: str) -> None:
    """Answers `ORDER CALLS` with the seconds of one call, after the instruction set in use."""
    keep_freed_memory()
    providers, case = {"native": PROVIDERS["native"]}, case_of(group)
    expected, made = truth(case), contenders(providers, providers, case)
    calls = {}
    for order in ORDERS:
        good, reasons = verified(providers, made, order, case, expected)
        if reasons:
            raise AssertionError(reasons)
        calls[order] = good[0].call
    print(native.cpu_isa(), flush=True)
    for line in sys.stdin:
        order, count = line.split()
        print(awake(calls[order], int(count)), flush=True)


def case_of(group: str) -> Case:
    return random_case(GROUPS[group], TASKS, torch.float32)


class HandedOn(Empty):
    """The same, whose backward depends on dY too: all of it can be differentiated again."""

    @staticmethod
    def backward(ctx, dY):
        R, G, L = ctx.saved_tensors
        return R, G + dY, L


def packing(case: Case) -> Orders:
    """What the lists form does around the transform, which here hands on what it gets."""
    problems = case.problems

    def layer(R: Form, G: Form, L: Form) -> Form:
        Y = HandedOn.apply(problems.R.pack(R), problems.packing.pack(G), problems.L.pack(L))
        return problems.packing.unpack(Y)

    return through_autograd(composed(layer, False), parameter_leaves(case))


def parts(case: Case) -> dict[str, Orders]:
    """The packed orders of the parameters with most of the operations alone, and of all others alone."""
    p_q = [p * q for _, p, q in case.problems.shapes]
    pieces = {
        LARGE: [shape for shape, size in zip(case.problems.shapes, p_q, strict=True) if size == max(p_q)],
        SMALL: [shape for shape, size in zip(case.problems.shapes, p_q, strict=True) if size < max(p_q)],
    }
    return {
        name: PROVIDERS["native"].make(random_case(Problems(shapes), TASKS, torch.float32))
        for name, shapes in pieces.items()
    }


def measure_group(group: str, repeats: int) -> list[Row]:
    """One row per order and contender.

    Raises:
        AssertionError: a contender of ours is wrong.
    """
    case = case_of(group)
    providers = {name: PROVIDERS[name] for name in TIMED}
    expected, made = truth(case), contenders(providers, providers, case)
    alone = {PACKING: packing(case), **parts(case)}
    point, rows = Point("tasks", TASKS, group, case.problems), []
    avx2 = OtherIsa("avx2", group) if native.cpu_isa() == "avx512" else None
    for order in ORDERS:
        good, reasons = verified(providers, made, order, case, expected)
        if wrong := [reasons[name] for name in ("native", "lists") if name in reasons]:
            raise AssertionError(f"{group} {order}: {'; '.join(wrong)}")
        functions = {contender.name: contender.call for contender in good}
        functions |= {name: orders[order] for name, orders in alone.items()}
        if avx2:
            functions[AVX2] = Remote(avx2, order)
        timings = interleaved(functions, repeats, sample=sample)
        flops = cost.flops(point, order)
        rows += [
            {"group": group, "order": order, "contender": name, "flops": flops, "seconds": timing._asdict()}
            for name, timing in timings.items()
        ]
        rows += [{"group": group, "order": order, "contender": name, "why_not": why} for name, why in reasons.items()]
    if avx2:
        avx2.close()
    return rows


def measure_host(repeats: int) -> list[Row]:
    """The host time of one call of each operator, on tiny operands that require gradients."""
    timings = interleaved(operator_calls() | {EMPTY: empty_call()}, repeats)
    return [{"order": name, "seconds": timing._asdict()} for name, timing in timings.items()]


class Line(NamedTuple):
    """One target in one place: what was measured, whether that holds, and what bounds it."""

    target: str
    where: str
    measured: str
    holds: bool
    bound: str = ""


def transform_lines(group: str, order: str, rows: list[Row], peak: float) -> Iterator[Line]:
    """The targets of one order of one network.

    rows: its contenders
    peak: multiply-adds per second, counted as two operations each
    """
    seconds = {row["contender"]: row["seconds"]["median"] for row in rows if "seconds" in row}
    where, ours, floor = f"{order}, {group}", seconds["native"], rows[0]["flops"] / peak
    if theirs := seconds.get("learn2learn"):
        ratio, around = theirs / seconds["lists"], seconds[PACKING]
        bound = (
            f"the packed form alone {theirs / ours:.0f}x; packing, unpacking and autograd around it "
            f"{1e6 * around:.0f} of {1e6 * seconds['lists']:.0f} us"
        )
        yield Line("lists in and out, against learn2learn's loop: 20x", where, f"{ratio:.1f}x", ratio >= 20, bound)
    best = min((name for name in PLAIN_TORCH if name in seconds), key=seconds.get)
    ratio, most = seconds[best] / ours, seconds[best] / floor
    yield Line(
        "packed, against the best plain torch: 8x",
        where,
        f"{ratio:.1f}x of {best}",
        ratio >= 8,
        f"{most:.1f}x at the FMA peak",
    )
    share, least = floor / ours, FLOOR_SHARE[order]
    bound = (
        f"{1e6 * ours:.0f} us; the largest parameters alone {1e6 * seconds[LARGE]:.0f}, "
        f"the others alone {1e6 * seconds[SMALL]:.0f}"
    )
    yield Line(f"share of the FMA floor: {least}", where, f"{share:.2f}", share >= least, bound)
    if AVX2 in seconds:
        rate = ours / seconds[AVX2]
        yield Line("AVX2's rate against AVX-512's: 0.4", where, f"{rate:.2f}", rate >= 0.4)


def host_lines(rows: list[Row]) -> Iterator[Line]:
    """The targets of the host time of a call."""
    host = {row["order"]: 1e6 * row["seconds"]["median"] for row in rows}
    bound = f"an empty autograd Function {host[EMPTY]:.1f} us"
    for order, most in HOST_US.items():
        target = f"host time of one call, gradients on: {most} us"
        yield Line(target, order, f"{host[order]:.1f} us", host[order] <= most, bound)


def meta_results(paths: Sequence[Path]) -> dict[str, object]:
    """The rows of files of bench/meta_peers.py, each with its number of tasks, and where they come from."""
    files = [read_json(path) for path in paths]
    return {
        "meta": [row | {"tasks": file["settings"]["tasks"]} for file in files for row in file["rows"]],
        "meta_from": [
            {"command": file["command"], "commit": file["commit"], "repeats": file["settings"]["repeats"]}
            for file in files
        ],
    }


def meta_lines(rows: list[Row]) -> Iterator[Line]:
    """The targets of the meta-iteration, from the rows of bench/meta_peers.py."""
    timed = [row for row in rows if row["method"] == "kfo" and row.get("over_ours")]
    for row in timed:
        ratio, network = row["over_ours"], row["network"]
        if row["contender"].startswith("jax"):
            yield Line(
                "a meta-iteration, against JAX: ahead", f"{network}, {row['contender']}", f"{ratio:.1f}x", ratio > 1
            )
        if row["contender"] != "learn2learn":
            continue
        yield Line("a meta-iteration, against learn2learn: 3x", network, f"{ratio:.1f}x", ratio >= 3)
        ours = next(r for r in timed if r["network"] == network and r["over_ours"] == 1)
        # In the place of a memory that could not be measured stands why.
        if isinstance(ours.get("memory"), dict) and isinstance(row.get("memory"), dict):
            share = ours["memory"]["working"] / row["tasks"] / row["memory"]["working"]
            target = "memory of a meta-iteration per task in flight, against learn2learn's: at most 1"
            yield Line(target, network, f"{share:.2f}", share <= 1)


def target_lines(result: dict[str, object]) -> list[Line]:
    """Every target of the CPU, those of one kind together."""
    peak, lines = 1e9 * result["fma_gflop_per_s"], []
    for group in NETWORKS:
        for order in ORDERS:
            rows = [row for row in result["rows"] if (row["group"], row["order"]) == (group, order)]
            lines += transform_lines(group, order, rows, peak)
    lines += [*host_lines(result["host"]), *meta_lines(result["meta"])]
    kinds = list(dict.fromkeys(line.target.partition(":")[0] for line in lines))
    return sorted(lines, key=lambda line: kinds.index(line.target.partition(":")[0]))


def markdown(result: dict[str, object]) -> str:
    """The table of targets."""
    made = (
        f"Made by `python bench/{result['command']}` on {result['processor']}, {result['torch_threads']} threads, "
        f"torch {result['torch']}, commit {result['commit'][:9]}; {result['fma_gflop_per_s']:.0f} GFLOP/s of "
        f"multiply-adds measured in the same run; medians of {result['settings']['repeats']} interleaved repeats, "
        f"{TASKS} tasks."
    )
    table = [
        f"| {line.target} | {line.where} | {line.measured} | {'yes' if line.holds else '**no**'} | {line.bound} |"
        for line in target_lines(result)
    ]
    others = [
        f"The rows of a meta-iteration: `python bench/{file['command']}`, commit {file['commit'][:9]}, medians of "
        f"{file['repeats']} interleaved repeats."
        for file in result["meta_from"]
    ]
    return "\n".join(
        [made, *others, "", "| target | where | measured | holds | bound |", "|---|---|---|---|---|", *table, ""]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21, help="rounds of every order")
    parser.add_argument("--meta", type=Path, nargs="*", default=[], help="what bench/meta_peers.py wrote")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes beside it")
    parser.add_argument("--serve", metavar="GROUP", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    available, reason = native.status()["cpu"]
    if not available:
        parser.error(f"the compiled CPU library: {reason}")
    if options.serve:
        serve(options.serve)
        return 0
    kept = keep_freed_memory()
    threads = torch.get_num_threads()
    before = fma_rate(threads)
    # First, as in a program of one's own: after torch.compile every call costs a microsecond or two more.
    host = measure_host(options.repeats)
    rows = [row for group in NETWORKS for row in measure_group(group, options.repeats)]
    result = environment() | {
        "cpu_isa": native.cpu_isa(),
        "settings": {"repeats": options.repeats, "keeps_freed_memory": kept},
        "fma_gflop_per_s": max(before, fma_rate(threads)) / 1e9,
        "rows": rows,
        "host": host,
        **meta_results(options.meta),
    }
    print(markdown(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)
        options.out.with_suffix(".md").write_text(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
