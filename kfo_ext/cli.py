"""The command `kfo`: train, eval, compare, export, doctor, demo, bench. An error is one line on stderr, exit code 2."""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kfo_ext.bench.names import AXES, GROUPS, ORDERS, PROVIDERS
from kfo_ext.choices import LARGEST_INTEGER, MOST_THREADS
from kfo_ext.machine import keep_freed_memory
from kfo_ext.runs.loggers import LOGGERS, checked
from kfo_ext.streams import complain, echo, open_streams, said, settle
from kfo_ext.trainer.listing import listed
from kfo_ext.trainer.signals import Unsaid, interrupt_ends, of_several

# Whatever needs torch is imported by the command that needs it: help and version take no time.

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Options whose text is a path.
PATHS = ("data_root", "cache", "splits")
_LOGGERS = ", ".join(f"{name} ({adapter.help})" for name, adapter in LOGGERS.items())
# What torch says where there is too little memory; MemoryError is Python's own.
NO_MEMORY = re.compile("(not enough|can't allocate|out of|no) memory|Storage size calculation overflowed|new thread")


def _number(help: str, *, least: int | None = None, most: int = LARGEST_INTEGER, **settings: Any) -> Any:
    """An option that takes a number, checked before any work begins; `most` bounds integers."""

    def check(value: float | None) -> float | None:
        if isinstance(value, float) and math.isnan(value):
            raise typer.BadParameter(f"expected a number, got {value}")
        if isinstance(value, int) and abs(value) > most:
            raise typer.BadParameter(f"expected at most {most}, got {value}")
        if value is not None and least is not None and value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}")
        return value

    return typer.Option(help=help, callback=check, **settings)


Split = Annotated[str, typer.Option(help="classes to take tasks from: train, validation or test")]
Checkpoint = Annotated[str, typer.Option(help="best (by validation) or last")]
# What an evaluation may set otherwise than the run: a score of its own, and a file of its own.
Steps = Annotated[int | None, _number("inner steps, 0 for none, instead of the run's", least=0, show_default=False)]
Shots = Annotated[int | None, _number("support examples of a class instead of the run's", least=1, show_default=False)]
Queries = Annotated[int | None, _number("query examples of a class instead of the run's", least=1, show_default=False)]
Ways = Annotated[
    int | None,
    _number("classes of a task instead of the run's, if the network fits any number", least=2, show_default=False),
]
Precision = Annotated[str | None, typer.Option(help="instead of the run's", show_default=False)]


def _print_version(wanted: bool) -> None:
    if wanted:
        from kfo_ext.version import __version__

        echo(f"kfo {__version__}")
        raise typer.Exit


@app.callback()
def kfo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Meta-learning with Kronecker-factored updates."""


class _Grouped(TyperCommand):
    """A command whose help lists its options under the headings of their panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each of a configuration; those not on the command line are left out of `given`."""
    options = []
    for name, group, option, help in listed():
        kind: Any = Path if name in PATHS else option.kind
        annotation = Annotated[kind | None, typer.Option(help=help, show_default=False, rich_help_panel=group)]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    names = [option.name for option in options]

    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in names}
        given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
        command(given=given, **arguments)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "given"] + options
    # What typer reads in place of the function's own.
    vars(wrapped)["__signature__"] = inspect.Signature(parameters)
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


@app.command(cls=_Grouped)
@_config_options
def train(
    given: dict[str, Any],
    run: Annotated[
        Path | None, typer.Option(help="folder of the new run  [default: runs/...]", show_default=False)
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="continue this run folder", show_default=False)] = None,
    time_budget: Annotated[
        float, _number("stop cleanly after so many seconds, then validate; 0 is no limit", least=0)
    ] = 0.0,
    log: Annotated[
        str | None,
        typer.Option(help=f"besides metrics.jsonl, comma-separated: {_LOGGERS}", show_default=False),
    ] = None,
) -> None:
    """Meta-train a network, and with it a learned update, in a run folder; under torchrun with all its processes."""
    with interrupt_ends():
        from kfo_ext.trainer.command import train as run_training
        from kfo_ext.trainer.ranks import joined

        # First: what is not installed leaves no folder.
        loggers = checked(_several(log) or ())
    keep_freed_memory()
    with joined() as group:
        run_training(given, run, resume, time_budget=time_budget, loggers=loggers, group=group, echo=echo)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    tasks: Annotated[int, _number("number of tasks")] = 1000,
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    seed: Annotated[int, _number("seed of the list of tasks", least=0)] = 0,
    steps: Steps = None,
    shots: Shots = None,
    queries: Queries = None,
    ways: Ways = None,
    device: Annotated[str | None, typer.Option(help="instead of the run's", show_default=False)] = None,
    data_root: Annotated[Path | None, typer.Option(help="instead of the run's", show_default=False)] = None,
    threads: Annotated[int | None, _number("instead of the run's", most=MOST_THREADS, show_default=False)] = None,
    precision: Precision = None,
) -> None:
    """Score a run on a fixed list of unseen tasks, with a 95 % interval; under torchrun with all its processes."""
    with interrupt_ends():
        from kfo_ext.runs import RunFolder
        from kfo_ext.trainer import evaluate_run
        from kfo_ext.trainer.ranks import Ranks, joined

    root = None if data_root is None else str(data_root)
    changes = _given(
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
    apart = "".join(f", {name} {value} instead of the run's" for name, value in score.changes.items())
    what = f"{score.tasks} {split} tasks, {checkpoint} checkpoint (iteration {score.iteration}){apart}"
    echo(f"{score.measure} {score.interval}  (95 % interval, {what})")
    # After the score, which a folder that cannot be written must not hide.
    score.save()
    echo(f"written: {score.path}")


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="run folder")],
    run_b: Annotated[Path, typer.Argument(help="run folder")],
    split: Split = "test",
    checkpoint: Checkpoint = "best",
    steps: Steps = None,
    shots: Shots = None,
    queries: Queries = None,
    ways: Ways = None,
    precision: Precision = None,
) -> None:
    """Compare two evaluated runs by the paired difference over their common list of tasks.

    Both must have been evaluated with the same --steps, --shots, --queries, --ways and --precision as here.
    """
    with interrupt_ends():
        from kfo_ext.runs import RunFolder
        from kfo_ext.trainer import compare_runs

    changes = _given(steps=steps, shots=shots, queries=queries, ways=ways, precision=precision)
    a, b, gap = compare_runs(RunFolder.open(run_a), RunFolder.open(run_b), split=split, name=checkpoint, **changes)
    for run, score in ((run_a, a), (run_b, b)):
        since = "" if score.current else f"; {checkpoint}.pt has been written since: evaluate it again"
        echo(f"{run}: {score.measure} {score.interval}  ({checkpoint} checkpoint, iteration {score.iteration}{since})")
    if apart := a.differing_settings(b):
        echo(f"settings that differ: {apart}")
    echo(f"paired difference: {gap.mean:+.4f} ± {gap.half:.4f}  (95 % interval, {a.tasks} {split} tasks)")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    to: Annotated[Path, typer.Option(help="an absent or empty folder")],
    checkpoint: Checkpoint = "best",
) -> None:
    """Write a run's network and update as safetensors, with a config.json, for other tools and `from_pretrained`."""
    with interrupt_ends():
        from kfo_ext.runs import RunFolder
        from kfo_ext.trainer import export_run

    for path in export_run(RunFolder.open(run), to, name=checkpoint):
        echo(f"written: {path}")


@app.command()
def doctor() -> None:
    """Print what is built and what loads, and test each available backend against float64."""
    with interrupt_ends():
        from kfo_ext.doctor import examine

    healthy = examine(echo)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option(help="takes runs and picture  [default: runs/demo-...]", show_default=False)
    ] = None,
    time_budget: Annotated[float, _number("seconds of training for each method")] = 75.0,
    tasks: Annotated[int, _number("test tasks")] = 1000,
) -> None:
    """Meta-train CNN(2) with MAML and with KFO on glyphs, and compare them on the same unseen tasks."""
    with interrupt_ends():
        from kfo_ext.demo import run

    keep_freed_memory()
    run(folder or _new_folder("demo"), time_budget=time_budget, tasks=tasks, echo=echo)


def _given(**options: Any) -> dict[str, Any]:
    """Those that were on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def _several(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(item.strip() for item in text.split(","))


def _counts(option: str, text: str | None) -> tuple[int, ...] | None:
    items = _several(text)
    if items is None:
        return None
    if not all(item.isdecimal() and 0 < int(item) <= LARGEST_INTEGER for item in items):
        raise ValueError(f"{option}: expected positive integers with commas between them, got {text!r}")
    return tuple(map(int, items))


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
    tasks: Annotated[
        str | None, typer.Option(help="values of the axis tasks, comma-separated", show_default=False)
    ] = None,
    providers: Annotated[str | None, typer.Option(help=_names(PROVIDERS), show_default=False)] = None,
    orders: Annotated[str | None, typer.Option(help=_names(ORDERS), show_default=False)] = None,
    repeats: Annotated[
        int | None, _number("samples of each, at most  [default: 15, quick: 5]", show_default=False)
    ] = None,
    budget: Annotated[
        float | None,
        _number("seconds to sample each order of a point  [default: 20, quick: 1.5]", show_default=False),
    ] = None,
    limit: Annotated[
        float | None,
        _number("seconds after which no point is begun  [default: none, quick: 120]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[
        int | None, _number("torch threads  [default: torch's]", most=MOST_THREADS, show_default=False)
    ] = None,
) -> None:
    """Time the transform and its updates against learn2learn, plain torch and JAX.

    Each is compared with float64 before it is timed; a star marks ours. Exit code 1 if one of ours is wrong.
    """
    with interrupt_ends():
        from kfo_ext.bench.command import Settings, run

    quickly: dict[str, Any] = {"repeats": 5, "seconds": 0.004, "budget": 1.5, "limit": 120.0} if quick else {}
    given = _given(
        axes=_several(axes),
        groups=_several(groups),
        tasks=_counts("--tasks", tasks),
        providers=_several(providers),
        orders=_several(orders),
        repeats=repeats,
        budget=budget,
        limit=limit,
        threads=threads,
    )
    settings = Settings(quick=quick, device=device, **{**quickly, **given})
    right = run(settings, out or _new_folder("bench"), echo)
    raise typer.Exit(0 if right else 1)


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def main() -> None:
    """Run the command line, and turn every expected error into one line and exit code 2."""
    open_streams()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="kfo", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _end(130, "aborted")
    except Unsaid:
        _end(2)
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        _end(2, said(error))
    except SystemExit:
        # The parser's own answer where nobody reads its help.
        _end(2, "standard output: Broken pipe")
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            smaller = "--hidden, --layers, --hidden-layers, --meta-batch, --shots, --queries, --steps or --workers"
            _end(2, f"not enough memory for these options ({said(error)}): less of {smaller} needs less")
        # A usage error of typer's own parser, whose class moved between its versions.
        if hasattr(error, "format_message"):
            _end(2, error.format_message())
        raise
    _end(code or 0, "aborted" if code == 130 else "")


def _end(code: int, message: str = "") -> None:
    if message:
        complain(f"kfo: {' '.join(message.split())}")
    settle()
    if of_several():
        # Without Python's teardown, in which threads of a process group may abort; what was to be written is.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
