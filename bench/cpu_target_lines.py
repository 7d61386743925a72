"""The table of bench/cpu_targets.py: every target, its measurement, whether it holds, and the bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from bench.cpu_target_run import EMPTY, FMA, LARGE, NETWORKS, PACKING, PLAIN_TORCH, SMALL, Row, on
from kfo_ext.bench.cases import ORDERS
from kfo_ext.bench.host import HOST_US
from kfo_ext.bench.points import TASKS
from kfo_ext.bench.result import provenance

FLOOR_SHARE = {"forward": 0.5, "backward": 0.3, "double_backward": 0.3}
ISA = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "the baseline"}
# (best, other) -> the least rate of the other relative to the best; other pairs are for information.
RATE = {("avx512", "avx2"): 0.4}
LISTS = {"gradient-lists": "factors packed as in KFO", "lists": "factors too"}
HEAD = ("target", "where", "measured", "holds", "as glibc comes", "bound")
# A number in each run.
Numbers = list[float]


class Line(NamedTuple):
    """One target in one place.

    Attributes:
        target: the target.
        where: the order and network.
        measured: the measurement.
        holds: whether the target holds; None without a target.
        as_glibc_comes: the measurement without keeping freed memory.
        bound: the bound.
    """

    target: str
    where: str
    measured: str
    holds: bool | None
    as_glibc_comes: str = ""
    bound: str = ""

    def text(self) -> str:
        """A line of Markdown."""
        holds = {True: "yes", False: "**no**", None: ""}[self.holds]
        return f"| {self.target} | {self.where} | {self.measured} | {holds} | {self.as_glibc_comes} | {self.bound} |"


def spread(numbers: Numbers, digits: int, unit: str = "") -> str:
    """The median over the runs, the least and the most, as in `6.7x (6.4..7.1)`."""
    middle, least, most = (f"{number:.{digits}f}" for number in (median(numbers), min(numbers), max(numbers)))
    return f"{middle}{unit}" + (f" ({least}..{most})" if len(numbers) > 1 else "")


def ratio(over: Numbers, under: Numbers) -> Numbers:
    """The ratios run by run, since conditions are equal within a run."""
    return [a / b for a, b in zip(over, under, strict=True)]


def seconds_of(rows: Sequence[Row]) -> dict[str, Numbers]:
    """The medians of each run by contender."""
    return {row["contender"]: row["runs"] for row in rows if "runs" in row}


def best_of_torch(seconds: dict[str, Numbers]) -> str:
    """The fastest plain torch."""
    return min((name for name in PLAIN_TORCH if name in seconds), key=lambda name: median(seconds[name]))


def transform_lines(
    group: str, order: str, rows: Sequence[Row], as_glibc_comes: Sequence[Row], peaks: Numbers, isa: str
) -> Iterator[Line]:
    """Make the targets of one order of one network.

    Args:
        group: the network.
        order: the order.
        rows: rows of its contenders.
        as_glibc_comes: the same without keeping freed memory.
        peaks: multiply-adds per second in each run, counted as two operations each, if rows do not time them.
        isa: the instruction set of our kernels.

    Yields:
        One line per target.
    """
    seconds, other = seconds_of(rows), seconds_of(as_glibc_comes)
    us = {name: 1e6 * median(numbers) for name, numbers in seconds.items()}
    where, ours = f"{order}, {group}", seconds["native"]
    (flops,) = {row["flops"] for row in rows if row["contender"] != FMA}
    if FMA in seconds:
        (operations,) = (row["flops"] for row in rows if row["contender"] == FMA)
        peaks = [operations / each for each in seconds[FMA]]
    floor = [flops / peak for peak in peaks]
    for form, what in LISTS.items() if "learn2learn" in seconds else ():
        times = ratio(seconds["learn2learn"], seconds[form])
        there = spread(ratio(other["learn2learn"], other[form]), 1, "x") if "learn2learn" in other else ""
        bound = f"{us[form]:.0f} us; the packed form alone {median(ratio(seconds['learn2learn'], ours)):.0f}x"
        if form == "lists":
            bound += f"; packing, unpacking and autograd around it {us[PACKING]:.0f} us"
        target = f"lists in and out, {what}, against learn2learn's loop: 20x"
        yield Line(target, where, spread(times, 1, "x"), median(times) >= 20, there, bound)
    best = best_of_torch(seconds)
    times, there = ratio(seconds[best], ours), ""
    if other:
        best_there = best_of_torch(other)
        there = f"{spread(ratio(other[best_there], other['native']), 1, 'x')} of {best_there}"
    bound = f"{median(ratio(seconds[best], floor)):.1f}x at the FMA peak"
    if any(row["contender"] == best and row["saved"] for row in rows):
        bound += "; that one reads products that the order before saved"
    target = "packed, against the best plain torch: 8x"
    yield Line(target, where, f"{spread(times, 1, 'x')} of {best}", median(times) >= 8, there, bound)
    share, least = ratio(floor, ours), FLOOR_SHARE[order]
    bound = f"{us['native']:.0f} us; the largest parameters alone {us[LARGE]:.0f}, the others alone {us[SMALL]:.0f}"
    yield Line(f"share of the FMA floor: {least}", where, spread(share, 2), median(share) >= least, bound=bound)
    for slower in ISA:
        if on(slower) in seconds:
            rate, least = ratio(ours, seconds[on(slower)]), RATE.get((isa, slower))
            target = f"{ISA[slower]}'s rate against {ISA[isa]}'s" + ("" if least is None else f": {least}")
            yield Line(target, where, spread(rate, 2), None if least is None else median(rate) >= least)


def host_lines(rows: Sequence[Row]) -> Iterator[Line]:
    """The targets of the host time of a call."""
    host = {row["order"]: [1e6 * seconds for seconds in row["runs"]] for row in rows}
    bound = f"an empty autograd Function {spread(host[EMPTY], 1)} us"
    for order, most in HOST_US.items():
        target = f"host time of one call, gradients on: {most} us"
        yield Line(target, order, spread(host[order], 1, " us"), median(host[order]) <= most, bound=bound)


def meta_lines(rows: Sequence[Row]) -> Iterator[Line]:
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
        # A memory that could not be measured is replaced by the reason.
        if isinstance(ours.get("memory"), dict) and isinstance(row.get("memory"), dict):
            share = ours["memory"]["working"] / row["tasks"] / row["memory"]["working"]
            target = "memory of a meta-iteration per task in flight, against learn2learn's: at most 1"
            yield Line(target, network, f"{share:.2f}", share <= 1)


def target_lines(result: Row) -> list[Line]:
    """Every target of the CPU, grouped by kind."""
    peaks, lines = [1e9 * rate for rate in result["fma_gflop_per_s"]], []
    for group in NETWORKS:
        for order in ORDERS:
            rows, other = (
                [row for row in result[kind] if (row["group"], row["order"]) == (group, order)]
                for kind in ("rows", "as_glibc_comes")
            )
            lines += transform_lines(group, order, rows, other, peaks, result["cpu_isa"])
    lines += [*host_lines(result["host"]), *meta_lines(result["meta"])]
    kinds = list(dict.fromkeys(line.target.partition(":")[0] for line in lines))
    return sorted(lines, key=lambda line: kinds.index(line.target.partition(":")[0]))


def markdown(result: Row) -> str:
    """The table of targets."""
    settings = result["settings"]
    made = (
        f"Made by `python bench/{result['command']}` on {result['processor']}, {result['torch_threads']} threads, "
        f"torch {result['torch']}, {provenance(result)}; {spread(result['fma_gflop_per_s'], 0)} GFLOP/s of "
        f"multiply-adds at best; the floor is reckoned with their median in the same rounds; {TASKS} tasks. "
        f"Medians over {settings['runs']} processes of medians of {settings['repeats']} interleaved repeats, "
        "and in brackets the least and the most of the processes; "
        "`as glibc comes`: in others that do not keep freed memory."
    )
    others = [
        f"The rows of a meta-iteration: `python bench/{file['command']}`, {provenance(file)}, medians of "
        f"{file['repeats']} interleaved repeats."
        for file in result["meta_from"]
    ]
    head = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return "\n".join([made, *others, "", *head, *(line.text() for line in target_lines(result)), ""])
