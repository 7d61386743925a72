"""Judging finished runs: the score of one checkpoint, and the paired difference of two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import checkpoint
from .config import Config, difference
from .evaluation import Interval, evaluate, mean_interval, paired_difference
from .files import read_json, write_json
from .precision import convolution_precision
from .progress import Progress
from .recipe import EVALUATION_SEED, build_family, build_learner
from .run_folder import RunFolder


class RunScore(NamedTuple):
    """Score of a run on a list of tasks: the name of the measure, its interval, and the file that holds all of it."""

    measure: str
    interval: Interval
    tasks: int
    iteration: int
    path: Path


def load_learner(run: RunFolder, name: str, **changes: Any) -> tuple[Config, nn.Module, Progress]:
    """The learner of a run as one of its checkpoints holds it.

    run: the run folder.
    name: best or last.
    changes: fields to set otherwise than the run did, such as device or data_root.
    out: configuration, learner, progress at that checkpoint.
    Raises: ValueError naming the file if the checkpoint cannot be used.
    """
    path = run.checkpoint(name)
    if name == "best" and not path.exists() and run.last.exists():
        raise ValueError(f"{path}: the run has not come to a validation yet; its last checkpoint can be used instead")
    config, state = Config.load(run.config), checkpoint.load(path)
    if mismatch := difference(config, Config.from_dict(state["config"], str(path))):
        raise ValueError(f"{path}: the checkpoint is of another configuration ({mismatch})")
    # How training went fast is not how the learner is judged, and may not exist on another device.
    config = replace(config, **{"cuda_graph": False, "channels_last": False} | changes)
    learner = build_learner(config)
    checkpoint.restore_learner(path, learner, state["learner"])
    return config, learner, Progress.from_dict(state["progress"], str(path))


def evaluate_run(
    run: RunFolder,
    *,
    split: str = "test",
    name: str = "best",
    tasks: int = 1000,
    seed: int = EVALUATION_SEED,
    **changes: Any,
) -> RunScore:
    """Score one checkpoint of a run, and write eval-SPLIT-NAME.json into the run folder.

    split: train, validation or test.
    name: best or last.
    tasks, seed: length and seed of the list of tasks.
    changes: fields of the configuration to set otherwise, such as device or data_root.
    Raises: ValueError naming the file or the argument at fault.
    """
    config, learner, progress = load_learner(run, name, **changes)
    if config.threads:
        torch.set_num_threads(config.threads)
    family = build_family(config, split, seed=seed)
    with convolution_precision(config.precision):
        scores = evaluate(learner, family, tasks=tasks, batch=config.meta_batch, workers=config.workers, progress=True)
    interval = mean_interval(scores.scores)
    path = run.evaluation(split, name)
    content = {
        "measure": config.measure,
        "mean": interval.mean,
        "interval": interval.half,
        "checkpoint": name,
        "iteration": progress.iteration,
        "precision": config.precision,
        "task_list": {"dataset": config.dataset, "split": split, "seed": seed, "tasks": tasks, "digest": scores.digest},
        "scores": scores.scores.tolist(),
    }
    write_json(path, content)
    return RunScore(config.measure, interval, tasks, progress.iteration, path)


def compare_runs(
    a: RunFolder, b: RunFolder, *, split: str = "test", name: str = "best"
) -> tuple[RunScore, RunScore, Interval]:
    """Paired difference a - b of two evaluated runs.

    split, name: which evaluation to read from both folders.
    Raises: ValueError if one is not evaluated, or if they were not evaluated on the same tasks.
    """
    (ours, list_a, scores_a), (theirs, list_b, scores_b) = (_read(run, split, name) for run in (a, b))
    if ours.measure != theirs.measure:
        raise ValueError(f"{theirs.path}: expected the measure {ours.measure}, got {theirs.measure}")
    apart = ", ".join(f"{key}: {list_a[key]} and {list_b.get(key)}" for key in list_a if list_a[key] != list_b.get(key))
    if apart:
        raise ValueError(f"{a.path} and {b.path} were evaluated on different tasks ({apart})")
    return ours, theirs, paired_difference(scores_a, scores_b)


def _read(run: RunFolder, split: str, name: str) -> tuple[RunScore, dict[str, Any], list[float]]:
    path = run.evaluation(split, name)
    if not path.exists():
        raise ValueError(f"{path}: not evaluated yet; run `kfo eval {run.path} --split {split} --checkpoint {name}`")
    content = read_json(path)
    try:
        interval = Interval(float(content["mean"]), float(content["interval"]))
        tasks = content["task_list"]
        score = RunScore(content["measure"], interval, tasks["tasks"], content["iteration"], path)
        return score, tasks, content["scores"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an evaluation written by kfo ({error!r})") from None
