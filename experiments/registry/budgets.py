"""Settings that all tuned entries share: the rule of successive halving at each budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..entry import Computed, Shown, Work
from ..halving import Fixed, Following, Halving, Rung, StartOf
from ..jobs import Settings, Test

OUTER_RATES = (0.0005, 0.001, 0.003)
# Initializations: torch's default, and that of the reference implementation.
STARTS = ("torch", "reference")
FEW_SHOT = {"ways": 5, "shots": 5, "queries": 5, "steps": 5, "meta_batch": 16}
VALIDATION = {"validation_every": 100, "validation_tasks": 300}
FINAL = (Test(tasks=1000), Test(tasks=1000, checkpoint="last"))
# Iterations of the first rung, and of the others with the number of settings kept.
Rungs = tuple[int, Sequence[tuple[int, int]]]
# The reference repository's Makefile takes 20,000 iterations; the paper gives no number.
PAPER: Rungs = (1000, [(2000, 4), (5000, 2), (20_000, 1)])


def tuned(
    base: Settings,
    rates: Sequence[float],
    starts: Sequence[str] = STARTS,
    *,
    cpu: Rungs,
    seeds: int = 3,
    tests: tuple[Test, ...] = FINAL,
    paper: Rungs = PAPER,
    **shared: Any,
) -> dict[str, Work]:
    """Make the works of a method whose inner rate, initialization and outer rate are tuned by successive halving.

    Args:
        base: its options, including `meta_lr`.
        rates: inner learning rates to try.
        starts: initializations to try.
        cpu: the rungs of this budget; `gpu` takes the same with five seeds.
        seeds: the number of final runs at `cpu`.
        tests: of the final runs.
        paper: the rungs of this budget.
        shared: options that replace `FEW_SHOT` and `VALIDATION`.

    Returns:
        The work of each budget.
    """
    common = {**FEW_SHOT, **VALIDATION, **shared, **base}

    def work(rungs: Rungs, seeds: int) -> Halving:
        first, rest = rungs
        return Halving(
            base=common,
            rates=tuple(rates),
            inits=tuple(starts),
            meta_lrs=OUTER_RATES,
            first=first,
            rungs=tuple(Rung(iterations=iterations, keep=keep) for iterations, keep in rest),
            seeds=tuple(range(seeds)),
            tests=tests,
        )

    smoke = Halving(
        base={**common, "validation_every": 2, "validation_tasks": 2},
        rates=tuple(rates[:1]),
        inits=tuple(starts[:1]),
        meta_lrs=(base["meta_lr"],),
        first=2,
        rungs=(Rung(iterations=2, keep=1),),
        seeds=(0,),
        tests=(Test(tasks=2),),
    )
    return {"ci": smoke, "cpu": work(cpu, seeds), "gpu": work(cpu, 5), "paper": work(paper, 5)}


def start_of(name: str, works: Mapping[str, Work]) -> dict[str, Work]:
    """The works of `tuned`, with the initialization that another entry has found; `ci` needs none."""
    return {
        budget: StartOf(of=name, work=work) if budget != "ci" and isinstance(work, Halving) else work
        for budget, work in works.items()
    }


def following(
    name: str,
    variants: Mapping[str, Settings],
    smoke: Settings,
    *,
    cpu: int,
    seeds: int = 1,
    without: tuple[str, ...] = (),
    tests: tuple[Test, ...] = FINAL,
) -> dict[str, Work]:
    """Make the works of runs at the setting that another entry has found.

    Args:
        name: of that entry.
        variants: options of each variant.
        smoke: the options of the run at `ci`.
        cpu: meta-iterations at this budget.
        seeds: the number of runs at `cpu`.
        without: options of that entry to leave out.
        tests: of the runs.

    Returns:
        The work of each budget.
    """

    def work(iterations: int, seeds: int) -> Following:
        return Following(
            of=name,
            variants=variants,
            without=without,
            iterations=iterations,
            seeds=tuple(range(seeds)),
            tests=tests,
        )

    return {
        "ci": fixed(smoke, variants, cpu=2)["ci"],
        "cpu": work(cpu, seeds),
        "gpu": work(cpu, 3),
        "paper": work(20_000, 5),
    }


def computed(
    function: Callable[..., dict[str, Any]],
    shown: Callable[[Mapping[str, Any]], Shown],
    smoke: Settings,
    full: Settings,
) -> dict[str, Work]:
    """The works of a function, whose `full` options hold at all budgets except `ci`."""
    work = Computed(function=function, shown=shown, options=full)
    return {"ci": Computed(function=function, shown=shown, options=smoke), "cpu": work, "gpu": work, "paper": work}


def fixed(
    base: Settings,
    variants: Mapping[str, Settings],
    *,
    cpu: int,
    seeds: int = 3,
    tests: tuple[Test, ...] = FINAL,
    **shared: Any,
) -> dict[str, Work]:
    """The works of runs with given settings; arguments as for `tuned`."""
    common = {**FEW_SHOT, **VALIDATION, **shared, **base}
    smoke = {**common, "validation_every": 2, "validation_tasks": 2}

    def work(iterations: int, seeds: int) -> Fixed:
        return Fixed(base=common, variants=variants, iterations=iterations, seeds=tuple(range(seeds)), tests=tests)

    first = dict(list(variants.items())[:1])
    return {
        "ci": Fixed(base=smoke, variants=first, iterations=2, seeds=(0,), tests=(Test(tasks=2),)),
        "cpu": work(cpu, seeds),
        "gpu": work(cpu, 5),
        "paper": work(20_000, 5),
    }
