"""`kfo train`: begins, resumes or, after a restart by torchrun, continues a run; on every rank."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfo_ext.invoked import program
from kfo_ext.runs import RunFolder
from kfo_ext.runs.metrics import Logger

from .config import Config
from .config_file import configured
from .described import described
from .loop import Trainer
from .ranks import Ranks, restarts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def train(
    given: Mapping[str, Any],
    run: Path | None,
    resume: Path | None,
    *,
    config: Path | None = None,
    time_budget: float,
    loggers: Iterable[str | Logger],
    group: ProcessGroup | None,
    echo: Callable[[str], None],
) -> None:
    """Meta-train in a run folder.

    Args:
        given: options of the configuration.
        run: the folder of a new run.
        resume: the folder of a run to continue.
        config: a file of further options, see `config_file`; `given` takes precedence.
        time_budget: as for `Trainer.fit`.
        loggers: as for `Trainer.fit`.
        group: the ranks that train together.
        echo: receives each line of output.

    Raises:
        ValueError: as `Trainer`, or there is a config file for a resumed run.
    """
    if config is not None:
        if resume is not None:
            raise ValueError("--config: a resumed run has its own config.json; give options on the command line")
        given = configured(config, given)
    trainer = _trainer(given, run, resume, group)
    say = echo if trainer.ranks.first else _nothing
    folder, begun = trainer.run.path, trainer.progress.iteration
    if trainer.ranks.first:
        for line in described(trainer):
            echo(line)
    say(f"run folder: {folder}{f', from iteration {begun}' if begun else ''}")
    outcome = trainer.fit(time_budget=time_budget, loggers=loggers)
    progress = outcome.progress
    best = ""
    if progress.best_iteration:
        score = f"{trainer.config.measure} {abs(progress.best_score):.4f}"
        best = f": best validation {score} at iteration {progress.best_iteration}"
    say(f"{outcome.reason} at iteration {progress.iteration} after {progress.elapsed:.0f} s{best}")
    files = [file.name for file in _files(trainer.run) if file.exists()]
    say(f"files in {folder}: {', '.join(files)}")
    name = shlex.quote(str(folder))
    if outcome.reason in ("interrupted", "time budget"):
        say(f"resume with: {program()} train --resume {name}")
    if trainer.run.best.exists():
        say(f"next: {program()} eval {name}")


def _files(run: RunFolder) -> tuple[Path, ...]:
    return run.config, run.metrics, run.best, run.last, run.curve


def _trainer(given: Mapping[str, Any], run: Path | None, resume: Path | None, group: ProcessGroup | None) -> Trainer:
    if resume is not None:
        if run is not None:
            raise ValueError("--run: the folder is that of --resume; give one of the two")
        return Trainer.resume(resume, group=group, **given)
    config = Config(**given)
    if restarts():
        if run is None:
            raise ValueError("--run: expected the folder in which a restart (--max-restarts) finds the run, got none")
        if Ranks(group).from_first(lambda: _begun(run, config)):
            return Trainer.resume(run, group=group, **given)
    return Trainer.start(config, run, group=group)


def _begun(path: Path, config: Config) -> bool:
    """Whether the folder holds a run of this configuration.

    Args:
        path: the folder.
        config: the configuration.

    Returns:
        False if it holds no run.

    Raises:
        ValueError: it holds a run of another configuration.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        return False
    ours, theirs = config.to_dict(), Config.load(run.config).to_dict()
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path}: already holds a run with {name} {theirs.get(name)!r}, expected {ours.get(name)!r} to go on "
                "with after a restart; continue it by --resume, or choose another folder"
            )
    return True


def _nothing(line: str) -> None:
    del line
