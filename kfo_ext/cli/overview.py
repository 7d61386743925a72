"""`kfo runs` and `kfo plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfo_ext.runs.overview import found_runs, summary, table
from kfo_ext.runs.run_folder import RunFolder
from kfo_ext.streams import complain, echo
from kfo_ext.trainer.signals import interrupt_ends


def runs(folder: Annotated[Path, typer.Argument(help="folder that holds runs, at any depth")] = Path("runs")) -> None:
    """List runs: what they train, how far they are, the best validation, and the score of `kfo eval` on test tasks."""
    summaries = [summary(path) for path in found_runs(folder)]
    if not summaries:
        echo(f"no runs in {folder}")
        return
    for line in table(summaries):
        echo(line)
    for each in summaries:
        for fault in each.faults:
            complain(fault)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    out: Annotated[Path, typer.Option(help="picture to write or replace: .png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Draw the learning curves of several runs in one picture: training, and validations with 95 % intervals."""
    with interrupt_ends():
        from kfo_ext.runs import plot_runs

    folders = {path: RunFolder.open(path) for path in runs}
    for path, run in folders.items():
        if not run.metrics.exists():
            raise ValueError(f"{path}: has no metrics.jsonl yet; train it first")
    names = [run.path.resolve().name for run in folders.values()]
    # The name alone if it identifies the run.
    labels = names if len(set(names)) == len(names) else [str(path) for path in folders]
    plot_runs({label: run.metrics for label, run in zip(labels, folders.values())}, out)
    echo(f"written: {out}")
