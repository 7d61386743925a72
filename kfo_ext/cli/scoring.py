"""`kfo eval`, `kfo compare` and `kfo export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfo_ext.choices import MOST_THREADS
from kfo_ext.runs.overview import trained
from kfo_ext.runs.run_folder import RunFolder
from kfo_ext.streams import complain, document, echo
from kfo_ext.trainer.signals import interrupt_ends

from .options import NO_DEFAULT, Checkpoint, Json, Precision, Queries, Run, Shots, Split, Steps, Ways, given, number

if TYPE_CHECKING:
    from kfo_ext.trainer import RunScore


def evaluate(
    run: Run,
    tasks: Annotated[int, number("number of tasks")] = 1000,
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    seed: Annotated[int, number("seed of the list of tasks", least=0)] = 0,
    steps: Steps = None,
    shots: Shots = None,
    queries: Queries = None,
    ways: Ways = None,
    device: Annotated[str | None, typer.Option(help="instead of the run's", **NO_DEFAULT)] = None,
    data_root: Annotated[Path | None, typer.Option(help="instead of the run's", **NO_DEFAULT)] = None,
    threads: Annotated[int | None, number("instead of the run's", most=MOST_THREADS, **NO_DEFAULT)] = None,
    precision: Precision = None,
    json: Json = False,
) -> None:
    """Score a run on a fixed list of unseen tasks, with a 95 % interval; under torchrun with all its processes."""
    with interrupt_ends():
        from kfo_ext.trainer import evaluate_run
        from kfo_ext.trainer.ranks import Ranks, joined

    root = None if data_root is None else str(data_root)
    changes = given(
        steps=steps,
        shots=shots,
        queries=queries,
        ways=ways,
        device=device,
        data_root=root,
        threads=threads,
        precision=precision,
    )
    folder = RunFolder.open(run)
    chosen: dict[str, Any] = {"split": split, "name": checkpoint, "tasks": tasks, "seed": seed}
    with joined() as group:
        score = evaluate_run(folder, **chosen, save=False, group=group, **changes)
        first = Ranks(group).first
    if not first:
        return
    if json:
        document(_content(run, score))
    else:
        apart = "".join(f", {name} {value} instead of the run's" for name, value in score.changes.items())
        what = f"{score.tasks} {split} tasks, {checkpoint} checkpoint (iteration {score.iteration}){apart}"
        echo(f"{score.measure} {score.interval}  (95 % interval, {what})")
    # After the score is printed: a folder that cannot be written must not hide it.
    score.save()
    (complain if json else echo)(f"written: {score.path}")


def compare(
    run_a: Run,
    run_b: Run,
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    steps: Steps = None,
    shots: Shots = None,
    queries: Queries = None,
    ways: Ways = None,
    precision: Precision = None,
    json: Json = False,
) -> None:
    """Compare two evaluated runs by the paired difference over their common list of tasks.

    Both must have been evaluated with the same --steps, --shots, --queries, --ways and --precision as here.
    """
    with interrupt_ends():
        from kfo_ext.trainer import compare_runs

    changes = given(steps=steps, shots=shots, queries=queries, ways=ways, precision=precision)
    folders = RunFolder.open(run_a), RunFolder.open(run_b)
    a, b, gap = compare_runs(*folders, split=split, name=checkpoint, **changes)
    sides = [(run, score, trained(folder)) for run, score, folder in zip((run_a, run_b), (a, b), folders)]
    since = f"{checkpoint}.pt has been written since: evaluate it again"
    if json:
        for run, score, _ in sides:
            if not score.current:
                complain(f"{run}: {since}")
        first, second = (_content(run, score) | {"iterations": iterations} for run, score, iterations in sides)
        difference = {"mean": gap.mean, "interval": gap.half, "tasks": a.tasks, "split": split}
        document({"a": first, "b": second, "difference": difference})
        return
    for run, score, iterations in sides:
        where = f"{checkpoint} checkpoint, iteration {score.iteration}"
        where += ("" if iterations is None else f" of {iterations}") + ("" if score.current else f"; {since}")
        echo(f"{run}: {score.measure} {score.interval}  ({where})")
    if sides[0][2] != sides[1][2]:
        echo(f"meta-iterations that differ: {sides[0][2]} and {sides[1][2]}")
    if apart := a.differing_settings(b):
        echo(f"settings that differ: {apart}")
    echo(f"paired difference: {gap.mean:+.4f} ± {gap.half:.4f}  (95 % interval, {a.tasks} {split} tasks)")


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="an absent or empty folder")],
    checkpoint: Checkpoint = "best",
) -> None:
    """Write a run's network and update as safetensors, with a config.json, for other tools and `from_pretrained`."""
    with interrupt_ends():
        from kfo_ext.trainer import export_run

    for path in export_run(RunFolder.open(run), to, name=checkpoint):
        echo(f"written: {path}")


def _content(run: Path, score: RunScore) -> dict[str, Any]:
    """The content of a score's file without the per-task scores; `current` is false if the checkpoint is newer."""
    content = {name: value for name, value in score.content.items() if name != "scores"}
    return {"run": str(run), **content, "current": score.current, "file": str(score.path)}
