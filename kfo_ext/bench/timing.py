"""Interleaved timing, and the facts of the machine that go with every number."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import NamedTuple

import torch

from kfo_ext.trainer.run_folder import environment as run_environment


class Timing(NamedTuple):
    """Seconds of one call: the median over the repeats, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    repeats: int
    calls_per_repeat: int


def wall_clock(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call, of so many in a row, for what has finished when it returns."""
    start = perf_counter()
    for _ in range(calls):
        function()
    return (perf_counter() - start) / calls


def interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    seconds: float = 0.02,
    sample: Callable[[Callable[[], object], int], float] = wall_clock,
) -> dict[str, Timing]:
    """Time every function once per round; each round starts with another one, so that drift hits all alike.

    functions: what to time, by name; each is called once before as a warm-up
    repeats: rounds
    seconds: a sample repeats its function until it lasts about that long
    sample: (function, calls) -> seconds of one call, measured over so many in a row
    """
    calls = {name: _calls_for(function, seconds, sample) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_ in range(repeats):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(sample(functions[name], calls[name]))
    return {name: _summary(values, calls[name]) for name, values in samples.items()}


def _calls_for(
    function: Callable[[], object], seconds: float, sample: Callable[[Callable[[], object], int], float]
) -> int:
    first = sample(function, 1)
    return 1 if first >= seconds else max(1, math.ceil(seconds / sample(function, 1)))


def _summary(values: list[float], calls: int) -> Timing:
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, len(ordered), calls)


def environment() -> dict[str, object]:
    """The machine, versions, git commit and command line of this run."""
    return run_environment() | {
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{package: _version(package) for package in ("learn2learn", "triton", "jax", "torchopt", "higher")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
