"""`kfo train` and `kfo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kfo_ext import machine
from kfo_ext.runs.loggers import LOGGERS, checked
from kfo_ext.streams import echo
from kfo_ext.trainer.signals import interrupt_ends

from .options import NO_DEFAULT, new_folder, number, several, with_config_options

_LOGGERS = ", ".join(f"{name} ({adapter.help})" for name, adapter in LOGGERS.items())


@with_config_options
def train(
    given: dict[str, Any],
    run: Annotated[Path | None, typer.Option(help="folder of the new run  [default: runs/...]", **NO_DEFAULT)] = None,
    resume: Annotated[Path | None, typer.Option(help="continue this run folder", **NO_DEFAULT)] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of options, a run's config.json, or its folder; options here count", **NO_DEFAULT),
    ] = None,
    time_budget: Annotated[
        float, number("stop cleanly after this many seconds, then validate; 0 is no limit", least=0)
    ] = 0.0,
    log: Annotated[
        str | None, typer.Option(help=f"besides metrics.jsonl, comma-separated: {_LOGGERS}", **NO_DEFAULT)
    ] = None,
) -> None:
    """Meta-train a network, and with it a learned update, in a run folder; under torchrun with all its processes."""
    with interrupt_ends():
        from kfo_ext.trainer.command import train as run_training
        from kfo_ext.trainer.ranks import joined

        # First: a logger that is not installed must leave no folder.
        loggers = checked(several(log) or ())
    machine.keep_freed_memory()
    with joined() as group:
        run_training(
            given, run, resume, config=config, time_budget=time_budget, loggers=loggers, group=group, echo=echo
        )


def demo(
    folder: Annotated[
        Path | None, typer.Option(help="takes runs and picture  [default: runs/demo-...]", **NO_DEFAULT)
    ] = None,
    time_budget: Annotated[float, number("seconds of training for each method")] = 75.0,
    tasks: Annotated[int, number("test tasks")] = 1000,
) -> None:
    """Meta-train CNN(2) with MAML and with KFO on glyphs, and compare them on the same unseen tasks."""
    with interrupt_ends():
        from kfo_ext.demo import run

    machine.keep_freed_memory()
    run(folder or new_folder("demo"), time_budget=time_budget, tasks=tasks, echo=echo)
