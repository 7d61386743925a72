"""The command `kfo`: train, eval, compare, doctor, demo, bench. Every error is one line on stderr and exit code 2."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from kfo_ext import demo as demonstration
from kfo_ext import doctor as doctoring
from kfo_ext.bench import command as benchmark
from kfo_ext.bench.cases import ORDERS
from kfo_ext.bench.points import AXES, GROUPS
from kfo_ext.bench.providers import PROVIDERS
from kfo_ext.trainer import Config, RunFolder, Trainer, compare_runs, evaluate_run
from kfo_ext.trainer.allocator import keep_freed_memory

app = typer.Typer(
    help="Meta-learning with Kronecker-factored updates.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Split = Annotated[str, typer.Option(help="classes to take tasks from: train, validation or test")]
Checkpoint = Annotated[str, typer.Option(help="best (by validation) or last")]


def _config_options(command):
    """Give a command one option for each field of Config; those not on the command line are left out of `given`."""
    hints = get_type_hints(Config)
    options = []
    for item in fields(Config):
        kind = Path if item.name == "data_root" else hints[item.name]
        choices = f" ({' | '.join(item.metadata['choices'])})" if item.metadata["choices"] else ""
        help = f"{item.metadata['help']}{choices}  [default: {'none' if item.default is None else item.default}]"
        annotation = Annotated[kind | None, typer.Option(help=help, show_default=False)]
        options.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def wrapped(**arguments):
        given = {item.name: arguments.pop(item.name) for item in fields(Config)}
        given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
        return command(given=given, **arguments)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "given"] + options
    wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


@app.command()
@_config_options
def train(
    given: dict[str, Any],
    run: Annotated[
        Path | None, typer.Option(help="folder of the new run  [default: runs/...]", show_default=False)
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="continue this run folder", show_default=False)] = None,
    time_budget: Annotated[float, typer.Option(help="stop cleanly after so many seconds; 0 is no limit", min=0)] = 0.0,
) -> None:
    """Meta-train a network, and with it a learned update, in a run folder."""
    keep_freed_memory()
    if resume is None:
        config = Config(**given)
        trainer = Trainer.start(config, run)
    elif run is not None:
        raise ValueError("--run: the folder is that of --resume; give one of the two")
    else:
        trainer = Trainer.resume(resume, **given)
    folder = trainer.run.path
    typer.echo(f"run folder: {folder}")
    outcome = trainer.fit(time_budget=time_budget)
    progress = outcome.progress
    best = ""
    if progress.best_iteration:
        score = f"{trainer.config.measure} {abs(progress.best_score):.4f}"
        best = f", best validation {score} at iteration {progress.best_iteration}"
    typer.echo(f"{outcome.reason} at iteration {progress.iteration} after {progress.elapsed:.0f} s{best}")
    typer.echo(f"learning curve: {trainer.run.curve}")
    if outcome.reason in ("interrupted", "time budget"):
        typer.echo(f"resume with: kfo train --resume {folder}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    tasks: Annotated[int, typer.Option(help="number of tasks")] = 1000,
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    seed: Annotated[int, typer.Option(help="seed of the list of tasks", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="instead of the run's", show_default=False)] = None,
    data_root: Annotated[Path | None, typer.Option(help="instead of the run's", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="instead of the run's", show_default=False)] = None,
    precision: Annotated[str | None, typer.Option(help="instead of the run's", show_default=False)] = None,
) -> None:
    """Score a run on a fixed list of unseen tasks, with a 95 % interval."""
    root = None if data_root is None else str(data_root)
    changes = {"device": device, "data_root": root, "threads": threads, "precision": precision}
    changes = {name: value for name, value in changes.items() if value is not None}
    folder = RunFolder.open(run)
    score = evaluate_run(folder, split=split, name=checkpoint, tasks=tasks, seed=seed, save=False, **changes)
    what = f"{score.tasks} {split} tasks, {checkpoint} checkpoint (iteration {score.iteration})"
    typer.echo(f"{score.measure} {score.interval}  (95 % interval, {what})")
    # After the score, which a folder that cannot be written must not hide.
    score.save()
    typer.echo(f"written: {score.path}")


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="run folder")],
    run_b: Annotated[Path, typer.Argument(help="run folder")],
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    precision: Annotated[str | None, typer.Option(help="as given to kfo eval", show_default=False)] = None,
) -> None:
    """Compare two evaluated runs by the paired difference over their common list of tasks."""
    changes = {} if precision is None else {"precision": precision}
    a, b, gap = compare_runs(RunFolder.open(run_a), RunFolder.open(run_b), split=split, name=checkpoint, **changes)
    for run, score in ((run_a, a), (run_b, b)):
        since = "" if score.current else f"; {checkpoint}.pt has been written since: evaluate it again"
        typer.echo(
            f"{run}: {score.measure} {score.interval}  ({checkpoint} checkpoint, iteration {score.iteration}{since})"
        )
    if apart := a.differing_settings(b):
        typer.echo(f"settings that differ: {apart}")
    typer.echo(f"paired difference: {gap.mean:+.4f} ± {gap.half:.4f}  (95 % interval, {a.tasks} {split} tasks)")


@app.command()
def doctor() -> None:
    """Print what is built and what loads, and test each available backend against float64."""
    healthy = doctoring.examine(typer.echo)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option(help="takes runs and picture  [default: runs/demo-...]", show_default=False)
    ] = None,
    time_budget: Annotated[float, typer.Option(help="seconds of training for each method")] = 75.0,
    tasks: Annotated[int, typer.Option(help="test tasks")] = 1000,
) -> None:
    """Meta-train CNN(2) with MAML and with KFO on glyphs, and compare them on the same unseen tasks."""
    keep_freed_memory()
    demonstration.run(folder or _new_folder("demo"), time_budget=time_budget, tasks=tasks, echo=typer.echo)


def _several(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(item.strip() for item in text.split(","))


def _names(known, default: str = "all") -> str:
    return f"comma-separated, of: {', '.join(known)}  [default: {default}]"


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="a few points of every axis in two minutes")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of results and pictures  [default: runs/bench-...]", show_default=False),
    ] = None,
    axes: Annotated[str | None, typer.Option(help=_names(AXES), show_default=False)] = None,
    groups: Annotated[
        str | None,
        typer.Option(help=f"of the axes tasks, hidden, psd; {_names(GROUPS, 'CNN(2)')}", show_default=False),
    ] = None,
    providers: Annotated[str | None, typer.Option(help=_names(PROVIDERS), show_default=False)] = None,
    orders: Annotated[str | None, typer.Option(help=_names(ORDERS), show_default=False)] = None,
    repeats: Annotated[
        int | None, typer.Option(help="samples of each, at most  [default: 15, quick: 5]", show_default=False)
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="seconds to sample each order of a point  [default: 20, quick: 1.5]", show_default=False),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="seconds after which no point is begun  [default: none, quick: 120]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="torch threads  [default: torch's]", show_default=False)] = None,
) -> None:
    """Time the transform and its updates against learn2learn, plain torch and JAX.

    Each is compared with float64 before it is timed; a star marks ours. Exit code 1 if one of ours is wrong.
    """
    quickly = {"repeats": 5, "seconds": 0.004, "budget": 1.5, "limit": 120.0} if quick else {}
    given = {
        "axes": _several(axes),
        "groups": _several(groups),
        "providers": _several(providers),
        "orders": _several(orders),
        "repeats": repeats,
        "budget": budget,
        "limit": limit,
        "threads": threads,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = benchmark.Settings(quick=quick, device=device, **{**quickly, **given})
    right = benchmark.run(settings, out or _new_folder("bench"), typer.echo)
    raise typer.Exit(0 if right else 1)


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def main() -> None:
    """Run the command line, and turn every expected error into one line and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="kfo", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("aborted", 130)
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        _fail(str(error) or type(error).__name__)
    except Exception as error:
        # A usage error of typer's own parser, whose class moved between its versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    sys.exit(code or 0)


def _fail(message: str, code: int = 2) -> None:
    typer.echo(f"kfo: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
