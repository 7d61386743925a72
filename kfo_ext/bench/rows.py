"""The rows of one point: every order and provider, with its numbers or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kfo_ext.bench import cost
from kfo_ext.bench.cases import random_case
from kfo_ext.bench.measure import Contender, affordable, contenders, time_eager, time_graph, time_host, verified
from kfo_ext.bench.memory import peak_extra_bytes
from kfo_ext.bench.orders import truth
from kfo_ext.bench.points import Point
from kfo_ext.bench.providers import Provider, kfo_rule
from kfo_ext.bench.result import Row
from kfo_ext.bench.roofs import Roofs
from kfo_ext.bench.timing import Timing

# Every column of results.csv; a row of results.json has the same keys.
COLUMNS = {
    "axis": "what grows; see `kfo bench --help`",
    "x": "its value",
    "group": "the parameters",
    "tasks": "rows of every packed operand",
    "psd": "R^T R and L^T L instead of R and L",
    "hidden": "hidden layers of the update",
    "order": "forward, backward or double_backward",
    "provider": "who computes it",
    "ours": "whether that is this package",
    "mode": "eager: called from Python; host: what issuing a call of ours takes; graph: replayed from a CUDA graph",
    "saved": "whether it reads intermediates that an order before it saved: less work, more memory than is counted",
    "status": "ok, or why there are no numbers",
    "median_s": "seconds of one call, the median over the repeats",
    "low_s": "20th percentile",
    "high_s": "80th percentile",
    "repeats": "samples",
    "calls_per_repeat": "calls in a row that make one sample",
    "flops": "operations of the cost model",
    "bytes": "bytes that must move",
    "gflop_per_s": "flops / median; not of one that is saved",
    "gb_per_s": "bytes / median",
    "floor_share": "the floor's time / median, 1 is the floor; not of one that is saved",
    "launches": "CUDA kernels of one call, where the plan says",
    "peak_bytes": "the most that tensors take during one call, outputs included; not of one that is saved",
    "error": "against float64, relative to the largest magnitude of an output",
    "best_other": "the fastest of the others here",
    "other_saved": "whether that one is saved",
    "other_over_this": "its median / this one's: below 1 we lose",
}


def empty_row(**known: object) -> Row:
    """A row with None for every unknown column."""
    return {**dict.fromkeys(COLUMNS), **known}


def rows_of(
    point: Point,
    providers: Mapping[str, Provider],
    orders: Sequence[str],
    roofs: Roofs,
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    budget: float,
) -> list[Row]:
    """Measure one point.

    Args:
        point: what to measure.
        providers: those that can run on the device.
        orders: names of the orders.
        roofs: the machine's bounds.
        device: where to measure.
        repeats: samples of each, at most.
        seconds: length of one sample.
        budget: seconds for the samples of one order, see `measure.affordable`.

    Returns:
        A row per order, mode and provider.
    """
    case = random_case(point.problems, point.tasks, torch.float32, device, psd=point.psd, hidden=point.hidden)
    expected = truth(case)
    if point.rule and "native" in providers:
        providers = {**providers, "native": providers["native"]._replace(make=kfo_rule)} if case.plain else providers
    made, on_cuda = contenders(providers, providers, case), device.type == "cuda"
    rows: list[Row] = []
    for order in orders:
        good, reasons = verified(providers, made, order, case, expected)
        good, too_slow, fitting = affordable(good, repeats, seconds, budget)
        eager = time_eager(providers, good, on_cuda, fitting, seconds)
        modes: dict[str, Mapping[str, Timing | str]] = {"eager": {**reasons, **too_slow, **eager}}
        if on_cuda:
            modes["host"] = time_host(providers, good, fitting)
            modes["graph"] = time_graph(providers, good, eager, fitting, seconds)
        by_name = {contender.name: contender for contender in good}
        for mode, timings in modes.items():
            in_mode = []
            for name in providers:
                if name in timings:
                    timing = timings[name]
                    row = empty_row(
                        axis=point.axis, x=point.x, group=point.group, tasks=point.tasks, psd=point.psd,
                        hidden=point.hidden, order=order, provider=name, ours=providers[name].ours, mode=mode,
                        saved=providers[name].reads_saved(order, case),
                        status=timing if isinstance(timing, str) else "ok",
                    )  # fmt: skip
                    if not isinstance(timing, str):
                        row |= _numbers(point, row, timing, roofs)
                        row |= _once(point, row, by_name[name], providers[name], device)
                    in_mode.append(row)
            rows += _compared(in_mode)
    return rows


def _numbers(point: Point, row: Row, timing: Timing, roofs: Roofs) -> Row:
    """A timing and its rates by the cost model; host times have no rates, since the host computes nothing."""
    times = {
        "median_s": timing.median,
        "low_s": timing.low,
        "high_s": timing.high,
        "repeats": timing.repeats,
        "calls_per_repeat": timing.calls_per_repeat,
    }
    if row["mode"] == "host":
        return times
    work, moved = cost.flops(point, row["order"]), cost.bytes_moved(point, row["order"])
    floor = roofs.seconds(row["mode"], work, moved)
    return {
        **times,
        "flops": work,
        "bytes": moved,
        "gflop_per_s": None if row["saved"] else work / timing.median / 1e9,
        "gb_per_s": moved / timing.median / 1e9,
        "floor_share": None if row["saved"] or floor is None else floor / timing.median,
    }


def _once(point: Point, row: Row, contender: Contender, provider: Provider, device: torch.device) -> Row:
    """The columns that take one more call: error and memory; and launches, if they are known."""
    out: Row = {"error": contender.error}
    if row["mode"] == "eager" and provider.streams and not row["saved"]:
        out["peak_bytes"] = peak_extra_bytes(contender.call, device)
    if contender.name == "native" and device.type == "cuda" and not point.rule:
        out["launches"] = cost.launches(point, row["order"])
    return out


def _compared(rows: list[Row]) -> list[Row]:
    """The rows of one order and mode, those of kfo_ext with the fastest of the others."""
    others = [row for row in rows if row["status"] == "ok" and not row["ours"]]
    best = min(others, key=lambda row: row["median_s"], default=None)
    if best:
        for row in rows:
            if row["status"] == "ok" and row["ours"]:
                row |= {"best_other": best["provider"], "other_saved": best["saved"]}
                row["other_over_this"] = best["median_s"] / row["median_s"]
    return rows


def loses(row: Row) -> bool:
    """Whether another provider is faster than this row of kfo_ext."""
    return row["other_over_this"] is not None and row["other_over_this"] < 1


def fails(row: Row) -> bool:
    """Whether this package gave wrong numbers, or failed although it should run."""
    return bool(row["ours"]) and str(row["status"]).startswith(("WRONG", "failed", "does not run"))
