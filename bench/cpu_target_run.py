"""One process of bench/cpu_targets.py: times every contender of the transform's orders, and the host time of a call.

    python bench/cpu_target_run.py --repeats 21

prints one line of JSON. Every contender is compared with float64 before it is timed, and all are timed in turn; kernels
of other instruction sets run in separate processes, in the same rounds. The process keeps freed memory for all
contenders: otherwise memory freed by one of them decides whether another's outputs are new pages in every call. With
`--as-glibc-comes` it does not, and times only the contenders whose ratios are targets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import Function

from kfo_ext.bench import cost
from kfo_ext.bench.cases import ORDERS, Case, Form, parameter_leaves, random_case
from kfo_ext.bench.host import Empty, empty_call, operator_calls
from kfo_ext.bench.measure import contenders, verified
from kfo_ext.bench.orders import Orders, composed, through_autograd, truth
from kfo_ext.bench.points import GROUPS, TASKS, Point
from kfo_ext.bench.providers import PROVIDERS
from kfo_ext.bench.result import Row
from kfo_ext.bench.roofs import fma_rate, multiply_adds
from kfo_ext.bench.timing import interleaved, rested, wall_clock
from kfo_ext.machine import keep_freed_memory
from kfo_ext.ops import library
from kfo_ext.problems import Problems

NETWORKS = ("CNN(2)", "CNN(4)")
PLAIN_TORCH = ("torch-matmul", "torch-einsum", "torch-formulas", "torch-compile", "torch-formulas-compile")
TIMED = ("native", "gradient-lists", "lists", *PLAIN_TORCH, "learn2learn")
EMPTY = "empty Function"
# Timed with the contenders, since other programs on a shared machine slow both: the rate that defines the floor.
FMA = "multiply-adds in registers"
PACKING, LARGE, SMALL = "packing alone", "native, largest parameters alone", "native, other parameters alone"
ROOT = Path(__file__).resolve().parent.parent


def on(isa: str) -> str:
    """The name of our kernels with another instruction set."""
    return f"native, {isa}"


class OtherIsa:
    """The packed orders in a separate process with kernels of another instruction set."""

    def __init__(self, isa: str, group: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.cpu_target_run", "--serve", group],
            env=os.environ | {"KFO_CPU_ISA": isa},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if (said := self._line()) != isa:
            raise RuntimeError(f"the process for {isa} says {said!r}")

    def seconds(self, order: str, calls: int) -> float:
        """Seconds per call, of `calls` calls in a row."""
        print(order, calls, file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _line(self) -> str:
        return self.process.stdout.readline().strip()


class Remote(NamedTuple):
    """One order of another process, to be timed like a function."""

    isa: OtherIsa
    order: str


def awake(function: Callable[[], object] | Remote, calls: int) -> float:
    """Seconds per call, of `calls` calls in a row, here or remote, after warm-up calls."""
    if isinstance(function, Remote):
        return function.isa.seconds(function.order, calls)
    for _ in range(1 + calls // 4):
        function()
    return wall_clock(function, calls)


def serve(group: str) -> None:
    """Print the instruction set in use, then answer each line `ORDER CALLS` with the seconds per call."""
    keep_freed_memory()
    providers, case = {"native": PROVIDERS["native"]}, case_of(group)
    expected, made = truth(case), contenders(providers, providers, case)
    calls = {}
    for order in ORDERS:
        good, reasons = verified(providers, made, order, case, expected)
        if reasons:
            raise AssertionError(reasons)
        calls[order] = good[0].call
    print(library.cpu_isa(), flush=True)
    for line in sys.stdin:
        order, count = line.split()
        print(awake(calls[order], int(count)), flush=True)


def case_of(group: str) -> Case:
    """The random case of a network."""
    return random_case(GROUPS[group], TASKS, torch.float32)


class HandedOn(Empty):
    """`Empty` with a backward that also returns dY, so that all of it can be differentiated again."""

    @staticmethod
    def backward(ctx, dY):
        """Return the operands and dY."""
        return HandedBack.apply(*ctx.saved_tensors, dY)


class HandedBack(Function):
    """A differentiable backward without arithmetic: our op has none outside its kernel, and a sum would be timed."""

    @staticmethod
    def forward(ctx, R, G, L, dY):
        """Return the operands."""
        return R.view_as(R), G.view_as(G), L.view_as(L)

    @staticmethod
    def backward(ctx, ddR, ddG, ddL):
        """Return the cotangents."""
        return ddR, ddG, ddL, ddG


def packing(case: Case) -> Orders:
    """The work of the lists form around the transform, which is replaced by an identity."""
    problems = case.problems

    def layer(R: Form, G: Form, L: Form) -> Form:
        Y = HandedOn.apply(problems.R.pack(R), problems.packing.pack(G), problems.L.pack(L))
        return problems.packing.unpack(Y)

    return through_autograd(composed(layer, False), parameter_leaves(case))


def parts(case: Case) -> dict[str, Orders]:
    """The packed orders of only the parameters with most operations, and of only the others."""
    p_q = [p * q for _, p, q in case.problems.shapes]
    pieces = {
        LARGE: [shape for shape, size in zip(case.problems.shapes, p_q, strict=True) if size == max(p_q)],
        SMALL: [shape for shape, size in zip(case.problems.shapes, p_q, strict=True) if size < max(p_q)],
    }
    return {
        name: PROVIDERS["native"].make(random_case(Problems(shapes), TASKS, torch.float32))
        for name, shapes in pieces.items()
    }


def measure_group(group: str, repeats: int, ratios_alone: bool) -> list[Row]:
    """Measure a network.

    Args:
        group: the network.
        repeats: rounds of every order.
        ratios_alone: omit measurements that are no target, and other instruction sets.

    Returns:
        One row per order and contender.

    Raises:
        AssertionError: a contender of ours is wrong.
    """
    case = case_of(group)
    providers = {name: PROVIDERS[name] for name in TIMED}
    expected, made = truth(case), contenders(providers, providers, case)
    alone = {} if ratios_alone else {PACKING: packing(case), **parts(case)}
    supported = library.supported_isas()
    slower = [] if ratios_alone else supported[supported.index(library.cpu_isa()) + 1 :]
    others = {isa: OtherIsa(isa, group) for isa in slower}
    point, rows = Point("tasks", TASKS, group, case.problems), []
    multiply_add, operations = multiply_adds(torch.get_num_threads())
    for order in ORDERS:
        good, reasons = verified(providers, made, order, case, expected)
        if wrong := [reasons[name] for name in TIMED[:3] if name in reasons]:
            raise AssertionError(f"{group} {order}: {'; '.join(wrong)}")
        functions = {contender.name: contender.call for contender in good}
        functions |= {name: orders[order] for name, orders in alone.items()}
        functions |= {on(isa): Remote(other, order) for isa, other in others.items()} | {FMA: multiply_add}
        twins = {on(isa): "native" for isa in others}
        where = {"group": group, "order": order, "flops": cost.flops(point, order)}
        for name, timing in interleaved(functions, repeats, sample=rested(awake), twins=twins).items():
            saved = name in providers and providers[name].reads_saved(order, case)
            row = where | {"contender": name, "saved": saved, "seconds": timing._asdict()}
            rows.append(row | {"flops": operations} if name == FMA else row)
        rows += [where | {"contender": name, "why_not": why} for name, why in reasons.items()]
    for other in others.values():
        other.close()
    return rows


def measure_host(repeats: int) -> list[Row]:
    """The host time of one call of each operator, on tiny operands that require gradients."""
    timings = interleaved(operator_calls() | {EMPTY: empty_call()}, repeats)
    return [{"order": name, "seconds": timing._asdict()} for name, timing in timings.items()]


def measure(repeats: int, as_glibc_comes: bool) -> Row:
    """The measurements of one process."""
    kept = not as_glibc_comes and keep_freed_memory()
    threads = torch.get_num_threads()
    before = fma_rate(threads)
    # First, as in an ordinary program: after torch.compile every call costs one or two microseconds more.
    host = [] if as_glibc_comes else measure_host(repeats)
    rows = [row for group in NETWORKS for row in measure_group(group, repeats, ratios_alone=as_glibc_comes)]
    return {
        "keeps_freed_memory": kept,
        "fma_gflop_per_s": max(before, fma_rate(threads)) / 1e9,
        "rows": rows,
        "host": host,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21, help="rounds of every order")
    parser.add_argument("--as-glibc-comes", action="store_true", help="do not keep freed memory")
    parser.add_argument("--serve", metavar="GROUP", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
    else:
        print(json.dumps(measure(options.repeats, options.as_glibc_comes)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
