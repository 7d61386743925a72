"""One job: meta-training in a run folder, resumed if it exists, and the scores after it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kfo_ext.runs import RunFolder
from kfo_ext.runs.files import read_json
from kfo_ext.runs.metrics import is_validation, read_metrics
from kfo_ext.trainer import Config, Trainer, evaluate_run

from .jobs import Job, Record, Test, encoded

# Results are named by their settings, in which the inner learning rate has the name on the left.
OPTIONS = {"fast_lr": "inner_lr"}
# The fields that differ between sessions of one environment.
OF_A_SESSION = ("started", "command")


class Interrupted(Exception):
    """A signal has requested a stop; the run can be resumed."""


def configuration(job: Job, root: Path | None) -> Config:
    """Make the configuration of a job.

    Args:
        job: the job.
        root: folder of its data; None for procedural data.

    Returns:
        The configuration, with one thread.
    """
    place: dict[str, Any] = {} if root is None else {"data_root": str(root)}
    options = {OPTIONS.get(name, name): value for name, value in job.settings.items()}
    return Config(**options, **place, iterations=job.iterations, threads=1)


def carry_out(job: Job, folder: Path, root: Path | None) -> tuple[Record, list[dict[str, Any]]]:
    """Compute the missing part of a job.

    Args:
        job: the job.
        folder: folder of the run; a run that exists is resumed.
        root: see `configuration`.

    Returns:
        The record, and the environments of its sessions.

    Raises:
        Interrupted: a signal has requested a stop.
        ValueError: the data does not exist, or another process runs this run.
    """
    config = configuration(job, root)
    run = RunFolder(folder)
    ended = ""
    if run.config.exists():
        place: dict[str, Any] = {} if root is None else {"data_root": str(root)}
        trainer = Trainer.resume(folder, iterations=job.iterations, **place)
        if job.tests and trainer.progress.iteration > job.iterations:
            # Another entry has trained the run for longer, so its checkpoints belong to that.
            return carry_out(job, folder.with_name(f"{folder.name}-{job.iterations}"), root)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        trainer = Trainer.start(config, folder)
    if trainer.progress.iteration < job.iterations:
        try:
            if trainer.fit().reason == "interrupted":
                raise Interrupted
        except FloatingPointError as error:
            ended = str(error)
    tests = [] if ended and not run.best.exists() else [_tested(run, config, test) for test in job.tests]
    return _record(job, run, ended, tests), _environments(run)


def _tested(run: RunFolder, config: Config, test: Test) -> dict[str, Any]:
    queries = config.ways * test.changes.get("queries", config.queries)
    try:
        score = evaluate_run(run, split=test.split, name=test.checkpoint, tasks=test.tasks, **test.changes)
    except FloatingPointError as error:
        none = {"iteration": None, "mean": None, "interval": None, "correct": "", "queries": queries}
        return {**asdict(test), **none, "failure": str(error)}
    return {
        **asdict(test),
        "iteration": score.iteration,
        "mean": score.interval.mean,
        "interval": score.interval.half,
        "correct": encoded(score.content["scores"], queries),
        "queries": queries,
    }


def _record(job: Job, run: RunFolder, ended: str, tests: list[dict[str, Any]]) -> Record:
    records = read_metrics(run.metrics)
    validations = [each for each in records if is_validation(each)]
    steps = [each for each in records if not is_validation(each)]
    training, before = [], 0
    for each in validations:
        part = [step["accuracy"] for step in steps if before < step["iteration"] <= each["iteration"]]
        training.append(round(sum(part) / max(1, len(part)), 4))
        before = each["iteration"]
    return Record(
        settings=dict(job.settings),
        iterations=steps[-1]["iteration"] if steps else 0,
        ended=ended,
        at=[each["iteration"] for each in validations],
        accuracy=[round(each["validation_accuracy"], 5) for each in validations],
        interval=[round(each["validation_interval"], 5) for each in validations],
        training=training,
        seconds=round(records[-1]["elapsed"], 1) if records else 0.0,
        tests=tests,
    )


def _environments(run: RunFolder) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for session in read_json(run.environment) if run.environment.exists() else []:
        plain = {name: value for name, value in session.items() if name not in OF_A_SESSION}
        if plain not in found:
            found.append(plain)
    return found
