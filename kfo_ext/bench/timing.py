"""Interleaved timing: every function once per round, so that disturbances of the machine affect all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple

# (function, calls) -> seconds per call, measured over that many in a row.
Sample = Callable[[Callable[[], object], int], float]
# Threads of OpenMP and XLA spin for some milliseconds after their work, on the core of the next contender.
PAUSE = 0.02  # s
CALIBRATIONS = 3
# A call that lasts this many samples is a sample without recalibration: a first call is slow, but not by that much.
LONG = 5


class Timing(NamedTuple):
    """Seconds of one call: the median over the repeats, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    repeats: int
    calls_per_repeat: int


def wall_clock(function: Callable[[], object], calls: int) -> float:
    """Seconds per call of `calls` calls in a row, for functions that have finished when they return."""
    start = perf_counter()
    for _ in range(calls):
        function()
    return (perf_counter() - start) / calls


def rested(sample: Sample) -> Sample:
    """The same sample after a pause in which all threads go to sleep."""

    def sample_rested(function: Callable[[], object], calls: int) -> float:
        time.sleep(PAUSE)
        return sample(function, calls)

    return sample_rested


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: float = 0.02,
    sample: Sample = wall_clock,
    twins: Mapping[str, str] | None = None,
) -> dict[str, Timing]:
    """The timing of every function, from interleaved samples: see `samples_of`."""
    found = samples_of(functions, repeats, seconds, sample, twins)
    return {name: _summary(values, calls) for name, (values, calls) in found.items()}


def samples_of(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: float = 0.02,
    sample: Sample = wall_clock,
    twins: Mapping[str, str] | None = None,
) -> dict[str, tuple[list[float], int]]:
    """Sample every function once per round.

    Each round starts with another function, so that drift affects all alike, and every other round is reversed: after
    long vector work a processor is slower for a while, which then affects both of two neighbours alike.

    Args:
        functions: what to time, by name; each is called once before as a warm-up.
        repeats: rounds.
        seconds: a sample repeats its function until it lasts about that long.
        sample: measures one function.
        twins: functions whose samples have as many calls as another's, by its name.

    Returns:
        Per function its samples, seconds per call each, and the number of calls in a sample.
    """
    twins = twins or {}
    calls = {name: _calls_for(functions[name], seconds, sample) for name in functions if name not in twins}
    calls |= {name: calls[other] for name, other in twins.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_ in range(repeats):
        start = round_ % len(names)
        for name in (names[start:] + names[:start])[:: -1 if round_ % 2 else 1]:
            samples[name].append(sample(functions[name], calls[name]))
    return {name: (values, calls[name]) for name, values in samples.items()}


def _calls_for(function: Callable[[], object], seconds: float, sample: Sample) -> int:
    # The fastest of several calibrations, since the first call and those after a pause are slow.
    calls, fastest = 1, math.inf
    for _ in range(CALIBRATIONS):
        fastest = min(fastest, sample(function, calls))
        if fastest >= LONG * seconds:
            return 1
        calls = math.ceil(seconds / fastest)
    return calls


def _summary(values: list[float], calls: int) -> Timing:
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, len(ordered), calls)
