"""`kfo doctor` and `kfo bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kfo_ext.bench.names import AXES, GROUPS, ORDERS, PROVIDERS
from kfo_ext.choices import MOST_THREADS
from kfo_ext.streams import document, echo
from kfo_ext.trainer.signals import interrupt_ends

from .options import NO_DEFAULT, Json, counts, given, new_folder, number, several


def doctor(json: Json = False) -> None:
    """Print what is built and what loads, and test each available backend against float64."""
    with interrupt_ends():
        from kfo_ext.doctor import examine

    report = examine((lambda line: None) if json else echo)
    if json:
        document(report)
    raise typer.Exit(0 if report["healthy"] else 1)


def _names(known: Any, default: str = "all") -> str:
    return f"comma-separated, of: {', '.join(known)}  [default: {default}]"


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="a few points of every axis in two minutes")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of results and pictures  [default: runs/bench-...]", **NO_DEFAULT),
    ] = None,
    axes: Annotated[str | None, typer.Option(help=_names(AXES), **NO_DEFAULT)] = None,
    groups: Annotated[
        str | None,
        typer.Option(help=f"of the axes tasks, hidden, psd; {_names(GROUPS, 'CNN(2)')}", **NO_DEFAULT),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="values of the axis tasks, comma-separated", **NO_DEFAULT)] = None,
    providers: Annotated[str | None, typer.Option(help=_names(PROVIDERS), **NO_DEFAULT)] = None,
    orders: Annotated[str | None, typer.Option(help=_names(ORDERS), **NO_DEFAULT)] = None,
    repeats: Annotated[int | None, number("samples of each, at most  [default: 15, quick: 5]", **NO_DEFAULT)] = None,
    budget: Annotated[
        float | None,
        number("seconds to sample each order of a point  [default: 20, quick: 1.5]", **NO_DEFAULT),
    ] = None,
    limit: Annotated[
        float | None,
        number("seconds after which no point is begun  [default: none, quick: 120]", **NO_DEFAULT),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, number("torch threads  [default: torch's]", most=MOST_THREADS, **NO_DEFAULT)] = None,
) -> None:
    """Time the transform and its updates against learn2learn, plain torch and JAX.

    Each provider is compared with float64 before it is timed; a star marks kfo_ext. Exit code 1 if kfo_ext is wrong.
    """
    with interrupt_ends():
        from kfo_ext.bench.command import Settings, run

    quickly: dict[str, Any] = {"repeats": 5, "seconds": 0.004, "budget": 1.5, "limit": 120.0} if quick else {}
    chosen = given(
        axes=several(axes),
        groups=several(groups),
        tasks=counts("--tasks", tasks),
        providers=several(providers),
        orders=several(orders),
        repeats=repeats,
        budget=budget,
        limit=limit,
        threads=threads,
    )
    settings = Settings(quick=quick, device=device, **{**quickly, **chosen})
    right = run(settings, out or new_folder("bench"), echo)
    raise typer.Exit(0 if right else 1)
