"""Verifies the providers of an order, then times the correct ones, interleaved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from kfo_ext.bench.cases import Case
from kfo_ext.bench.device_timing import captured, events, finished, host, per_call
from kfo_ext.bench.orders import LeftOut, Orders, error_of
from kfo_ext.bench.providers import Provider
from kfo_ext.bench.timing import CALIBRATIONS, Timing, interleaved, wall_clock

# Error allowed in float32, relative to the largest magnitude of an output in float64.
TOLERANCE = 1e-4
MIN_REPEATS = 3
TOO_SLOW = "left out: one call takes"


class Contender(NamedTuple):
    """A provider whose outputs of an order are verified.

    Attributes:
        name: of the provider.
        call: computes the order.
        error: relative to the truth in float64.
    """

    name: str
    call: Callable[[], object]
    error: float


def one_line(error: Exception) -> str:
    """The type and the first line of an error, for a table."""
    return f"{type(error).__name__}: {' '.join((str(error).splitlines() or [''])[0].split())[:120]}"


def contenders(providers: Mapping[str, Provider], names: Iterable[str], case: Case) -> dict[str, Orders | str]:
    """The orders of every provider that runs on a case, or the reason why it does not."""

    def made(provider: Provider) -> Orders | str:
        try:
            return provider.make(case)
        except LeftOut as error:
            return f"left out: {error}"
        except Exception as error:  # whatever it is, it is the finding
            return f"does not run: {one_line(error)}"

    return {name: made(providers[name]) for name in names}


def verified(
    providers: Mapping[str, Provider],
    made: Mapping[str, Orders | str],
    order: str,
    case: Case,
    expected: dict[str, list[Tensor]],
) -> tuple[list[Contender], dict[str, str]]:
    """The providers whose outputs of one order are correct, and why the others are not timed."""
    good, reasons = [], {}
    for name, orders in made.items():
        if isinstance(orders, str):
            reasons[name] = orders
            continue
        try:
            error = error_of(providers[name].pack, order, orders[order](), case, expected)
        except Exception as failure:  # as above
            reasons[name] = f"failed: {one_line(failure)}"
            continue
        if error <= TOLERANCE:
            good.append(Contender(name, orders[order], error))
        else:
            reasons[name] = f"WRONG: relative error {error:.1e}, allowed {TOLERANCE:.0e}"
    return good, reasons


def affordable(
    good: list[Contender], repeats: int, seconds: float, budget: float
) -> tuple[list[Contender], dict[str, str], int]:
    """Select the contenders whose fewest repeats fit in the budget.

    Args:
        good: verified contenders.
        repeats: samples of each, at most.
        seconds: of one sample; a call that lasts longer is a sample.
        budget: seconds for all of them together; each may spend it all on its fewest repeats.

    Returns:
        The contenders kept, why the others are left out, and the repeats for all.
    """
    kept, reasons, round_ = [], {}, 0.0
    for contender in good:
        last = finished(contender.call, 1)
        if (MIN_REPEATS + 1) * last > budget:
            # Once more: other work on the machine may have made it look slow.
            last = min(last, finished(contender.call, 1))
        if (MIN_REPEATS + 1) * last > budget:
            reasons[contender.name] = f"{TOO_SLOW} {last:.2g} s, too long for {budget:g} s per order"
        else:
            kept.append(contender)
            round_ += max(last, seconds)
    fitting = math.floor(budget / round_) - CALIBRATIONS if round_ else repeats
    return kept, reasons, max(min(repeats, MIN_REPEATS), min(repeats, fitting))


def time_eager(
    providers: Mapping[str, Provider], good: list[Contender], on_cuda: bool, repeats: int, seconds: float
) -> dict[str, Timing]:
    """The time of one call as issued from Python: by events on a GPU, else by the wall clock."""
    on_events = {c.name: c.call for c in good if on_cuda and providers[c.name].streams}
    on_wall = {c.name: c.call for c in good if c.name not in on_events}
    timings: dict[str, Timing] = {}
    for functions, sample in ((on_events, events), (on_wall, wall_clock)):
        if functions:
            timings |= interleaved(functions, repeats, seconds, sample)
    return timings


def time_host(providers: Mapping[str, Provider], good: list[Contender], repeats: int) -> dict[str, Timing]:
    """The time to issue one call of kfo_ext to a GPU."""
    ours = {c.name: c.call for c in good if providers[c.name].ours}
    return interleaved(ours, repeats, 2e-4, host) if ours else {}


def time_graph(
    providers: Mapping[str, Provider],
    good: list[Contender],
    eager: Mapping[str, Timing],
    repeats: int,
    seconds: float,
) -> dict[str, Timing | str]:
    """The time of one call replayed from a CUDA graph, or why it cannot be captured."""
    graphs, calls, out = {}, {}, {}
    for name, call, _ in good:
        if not providers[name].graph:
            continue
        # About 200 us per replay, so that the launch of the graph is negligible.
        calls[name] = min(20, max(1, math.ceil(2e-4 / eager[name].median)))
        try:
            graphs[name] = captured(call, calls[name])
        except Exception as error:  # as above
            out[name] = f"not captured: {one_line(error)}"
    timings = interleaved(graphs, repeats, seconds, events) if graphs else {}
    return out | {name: per_call(timing, calls[name]) for name, timing in timings.items()}
