"""Judging finished runs: the score of one checkpoint, and the paired difference of two."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kfo_ext.runs import checkpoint
from kfo_ext.runs.files import is_count, is_number, read_json, write_json
from kfo_ext.runs.progress import Progress
from kfo_ext.runs.run_folder import RunFolder

from .config import Config, difference, settings
from .evaluation import Interval, evaluate, mean_interval, paired_difference
from .precision import convolution_precision
from .recipe import EVALUATION_SEED, build_family, build_learner

# How training went fast is not how the learner is judged, and may not exist on another device.
_PLAIN = {"cuda_graph": False, "channels_last": False}


class RunScore(NamedTuple):
    """Score of a run on a list of tasks.

    measure, interval: the name of the measure, and its mean with the 95 % interval.
    tasks: length of the list.
    iteration: of the checkpoint.
    settings: the configuration's fields that decide the score, as they were.
    current: whether the checkpoint on disk is still the one that was scored.
    path: the file that holds all of it.
    content: what that file holds.
    """

    measure: str
    interval: Interval
    tasks: int
    iteration: int
    settings: dict[str, Any]
    current: bool
    path: Path
    content: dict[str, Any]

    def save(self) -> None:
        """Write the file.

        Raises: OSError naming it if it cannot be written.
        """
        write_json(self.path, self.content)

    def differing_settings(self, other: RunScore) -> str:
        """Name the settings in which two scores differ, such as 'steps: 5 and 10'; '' if there are none."""
        return _apart(self.settings, other.settings)


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
        best = Progress.from_dict(checkpoint.load(run.last)["progress"], str(run.last)).best_iteration
        reason = f"the checkpoint, of iteration {best}, is lost" if best else "the run has not come to a validation yet"
        raise ValueError(f"{path}: {reason}; its last checkpoint can be used instead")
    config, state = Config.load(run.config), checkpoint.load(path)
    if mismatch := difference(config, Config.from_dict(state["config"], str(path))):
        raise ValueError(f"{path}: the checkpoint is of another configuration ({mismatch})")
    config = replace(config, **_PLAIN | changes)
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
    save: bool = True,
    **changes: Any,
) -> RunScore:
    """Score one checkpoint of a run, and write eval-SPLIT-NAME.json into the run folder.

    split: train, validation or test.
    name: best or last.
    tasks, seed: length and seed of the list of tasks.
    save: false leaves the writing to `RunScore.save`: a score outlives a folder that cannot be written.
    changes: fields of the configuration to set otherwise, such as device or data_root. One that changes the score, such
    as steps, becomes part of the file's name: eval-test-best-steps=10.json.
    Raises: ValueError naming the file or the argument at fault, OSError naming the file that cannot be written.
    """
    # Before loading: a checkpoint that is replaced in between counts as another one.
    digest = checkpoint.digest(run.checkpoint(name)) if run.checkpoint(name).exists() else ""
    config, learner, progress = load_learner(run, name, **changes)
    path = _path(run, split, name, changes)
    if config.threads:
        torch.set_num_threads(config.threads)
    family = build_family(config, split, seed=seed)
    with convolution_precision(config.precision):
        scores = evaluate(learner, family, tasks=tasks, batch=config.meta_batch, workers=config.workers, progress=True)
    interval = mean_interval(scores.scores)
    content = {
        "measure": config.measure,
        "mean": interval.mean,
        "interval": interval.half,
        "checkpoint": name,
        "iteration": progress.iteration,
        "checkpoint_digest": digest,
        "settings": settings(config),
        "task_list": {"dataset": config.dataset, "split": split, "seed": seed, "tasks": tasks, "digest": scores.digest},
        "scores": scores.scores.tolist(),
    }
    score = RunScore(config.measure, interval, tasks, progress.iteration, content["settings"], True, path, content)
    if save:
        score.save()
    return score


def compare_runs(
    a: RunFolder, b: RunFolder, *, split: str = "test", name: str = "best", **changes: Any
) -> tuple[RunScore, RunScore, Interval]:
    """Paired difference a - b of two evaluated runs; `RunScore.differing_settings` says in what else they differ.

    split, name: which evaluation to read from both folders.
    changes: as given to `evaluate_run`.
    Raises: ValueError if one is not evaluated, or if they were not evaluated on the same tasks.
    """
    ours, theirs = (_read(run, split, name, changes) for run in (a, b))
    if ours.measure != theirs.measure:
        raise ValueError(f"{theirs.path}: expected the measure {ours.measure}, got {theirs.measure}")
    if apart := _apart(ours.content["task_list"], theirs.content["task_list"]):
        raise ValueError(f"{ours.path} and {theirs.path} were evaluated on different tasks ({apart})")
    return ours, theirs, paired_difference(ours.content["scores"], theirs.content["scores"])


def _apart(a: dict[str, Any], b: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {a.get(key)} and {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key))


def _path(run: RunFolder, split: str, name: str, changes: dict[str, Any]) -> Path:
    """Where a score goes: the changes that are the run's own settings anyway are none."""
    own = Config.load(run.config)
    wanted, usual = settings(replace(own, **_PLAIN | changes)), settings(own)
    return run.evaluation(split, name, **{key: value for key, value in wanted.items() if value != usual[key]})


def _read(run: RunFolder, split: str, name: str, changes: dict[str, Any]) -> RunScore:
    saved = run.checkpoint(name)
    path = _path(run, split, name, changes)
    if not path.exists():
        what = "".join(f", {key} {value}" for key, value in changes.items())
        command = f"kfo eval {run.path} --split {split} --checkpoint {name}"
        raise ValueError(f"{path}: not evaluated yet; run `{command}`{what}")
    content = read_json(path)
    if fault := _fault(content, split, name):
        raise ValueError(f"{path}: not an evaluation written by kfo ({fault}); evaluate the run again")
    return RunScore(
        content["measure"],
        Interval(content["mean"], content["interval"]),
        content["task_list"]["tasks"],
        content["iteration"],
        content["settings"],
        not saved.exists() or checkpoint.digest(saved) == content["checkpoint_digest"],
        path,
        content,
    )


def _fault(content: Any, split: str, name: str) -> str:
    """What is wrong with the content of an evaluation file; '' if nothing is."""
    if not isinstance(content, dict):
        return "no object"
    listed, scores = content.get("task_list"), content.get("scores")
    if not isinstance(listed, dict) or not isinstance(content.get("settings"), dict):
        return "no task list or settings"
    if (listed.get("split"), content.get("checkpoint")) != (split, name):
        return "of another split or checkpoint"
    if content.get("measure") not in ("accuracy", "loss") or not is_count(content.get("iteration")):
        return "no measure or iteration"
    if not isinstance(content.get("checkpoint_digest"), str):
        return "no digest of its checkpoint"
    if not isinstance(scores, list) or len(scores) < 2 or not all(map(is_number, scores)):
        return "no list of scores"
    if not is_count(listed.get("tasks")) or listed["tasks"] != len(scores):
        return f"{len(scores)} scores of {listed.get('tasks')} tasks"
    stated = (content.get("mean"), content.get("interval"))
    if not all(map(is_number, stated)) or not all(
        math.isclose(*pair, abs_tol=1e-9) for pair in zip(stated, mean_interval(scores), strict=True)
    ):
        return "its mean and interval are not those of its scores"
    return ""
