"""Timing on a CUDA device: events, captured graphs, and the lower bound for any kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kfo_ext.bench.timing import Timing, interleaved, wall_clock

# Bytes of the copied tensor: far larger than any cache.
COPIED = {"cuda": 2**30, "cpu": 2**26}


def events(function: Callable[[], object], calls: int) -> float:
    """Seconds per call on the current stream, between two CUDA events around `calls` calls in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def finished(function: Callable[[], object], calls: int) -> float:
    """Seconds per call of `calls` calls in a row, until a CUDA device has finished them too."""

    def all_done() -> None:
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wall_clock(all_done, 1) / calls


def host(function: Callable[[], object], calls: int) -> float:
    """Seconds of host time to issue one call; few enough calls that the device's queue never fills."""
    torch.cuda.synchronize()
    seconds = wall_clock(function, min(calls, 50))
    torch.cuda.synchronize()
    return seconds


def captured(function: Callable[[], object], calls: int) -> Callable[[], object]:
    """Capture `calls` calls in one graph on the current stream, which must not be the default one.

    Args:
        function: what to call.
        calls: the number of calls in the graph.

    Returns:
        The replay of the graph.

    Raises:
        RuntimeError: the function cannot be captured.
    """
    stream = torch.cuda.current_stream()
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def per_call(timing: Timing, calls: int) -> Timing:
    """The timing of one call, given that of a replay of `calls` calls."""
    median, low, high = (value / calls for value in timing[:3])
    return Timing(median, low, high, timing.repeats, timing.calls_per_repeat * calls)


class Floor(NamedTuple):
    """Lower bounds for any kernel here.

    Attributes:
        bandwidth: bytes per second of a copy within the device, read and written.
        launch: seconds of the smallest torch operation, by mode ("eager", "graph").
    """

    bandwidth: float
    launch: dict[str, float]

    def seconds(self, mode: str, moved: float) -> float:
        """The minimum time of a call that must move `moved` bytes."""
        return max(moved / self.bandwidth, self.launch[mode])


def measure_floor(device: torch.device, repeats: int, seconds: float) -> Floor:
    """Measure copy bandwidth and the time of an operation on one element, on the current stream."""
    on_cuda = device.type == "cuda"
    sample = events if on_cuda else wall_clock
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device).zero_()
    target, one = torch.empty_like(source), torch.zeros(1, device=device)
    functions: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "eager": lambda: one.add_(1)}
    calls = 100
    if on_cuda:
        functions["graph"] = captured(functions["eager"], calls)
    timings = interleaved(functions, repeats, seconds, sample)
    launch = {"eager": timings["eager"].median}
    if on_cuda:
        launch["graph"] = timings["graph"].median / calls
    return Floor(2 * COPIED[device.type] / timings["copy"].median, launch)
