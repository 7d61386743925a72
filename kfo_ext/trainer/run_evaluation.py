"""Evaluation of finished runs: the score of one checkpoint, and the paired difference of two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kfo_ext.adapt import MAML
from kfo_ext.invoked import program
from kfo_ext.machine import versions
from kfo_ext.runs import checkpoint
from kfo_ext.runs.files import read_json, write_json
from kfo_ext.runs.progress import Progress
from kfo_ext.runs.run_folder import RunFolder
from kfo_ext.runs.scores import fault
from kfo_ext.tasks.checks import check_count

from .config import Config, difference, options_in_effect, settings
from .evaluation import Interval, evaluate, fingerprint, mean_interval, paired_difference
from .options import TRAINING
from .precision import convolution_precision
from .ranks import Ranks
from .recipe import EVALUATION_SEED, build_family, build_learner

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Speed options of training do not belong to an evaluation, and may not exist on another device.
_PLAIN = {"cuda_graph": False, "channels_last": False}


class RunScore(NamedTuple):
    """The score of a run on a list of tasks.

    Attributes:
        measure: the name of the measure.
        interval: its mean with the 95 % interval.
        tasks: length of the list.
        iteration: of the checkpoint.
        settings: the values of the options that determine the score.
        changes: those that differ from the run's own.
        current: whether the checkpoint on disk is still the one that was scored.
        path: the file that holds all of it.
        content: the content of that file.
    """

    measure: str
    interval: Interval
    tasks: int
    iteration: int
    settings: dict[str, Any]
    changes: dict[str, Any]
    current: bool
    path: Path
    content: dict[str, Any]

    def save(self) -> None:
        """Write the file.

        Raises:
            OSError: the file cannot be written; the message names it.
        """
        write_json(self.path, self.content)

    def differing_settings(self, other: RunScore) -> str:
        """Name the settings in which two scores differ.

        Options that only one of them has follow from a setting that differs, such as the update.

        Args:
            other: the other score.

        Returns:
            A text such as 'steps: 5 and 10'; '' if there are none.
        """
        common = self.settings.keys() & other.settings.keys()
        return _apart(*({name: value for name, value in s.settings.items() if name in common} for s in (self, other)))


def load_learner(run: RunFolder, name: str, **changes: Any) -> tuple[Config, MAML, Progress]:
    """Load the learner of a run from one of its checkpoints.

    Args:
        run: the run folder.
        name: best or last.
        changes: options that differ from the run's, such as device, data_root or steps.

    Returns:
        Configuration, learner, progress at that checkpoint.

    Raises:
        ValueError: the checkpoint cannot be used, or does not allow the change of an option; the message names the file
            or the option.
    """
    path = run.checkpoint(name)
    if name == "best" and not path.exists() and run.last.exists():
        best = Progress.from_dict(checkpoint.load(run.last)["progress"], str(run.last)).best_iteration
        reason = f"the checkpoint, of iteration {best}, is lost" if best else "the run has not come to a validation yet"
        raise ValueError(f"{path}: {reason}; its last checkpoint can be used instead")
    own, state = Config.load(run.config), checkpoint.load(path)
    if mismatch := difference(own, Config.from_dict(state["config"], str(path))):
        raise ValueError(f"{path}: the checkpoint is of another configuration ({mismatch})")
    config, learner = restored(own, path, state["learner"], changes)
    return config, learner, Progress.from_dict(state["progress"], str(path))


def restored(own: Config, path: Path, values: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Config, MAML]:
    """Rebuild the learner of a run's configuration with trained values.

    Args:
        own: the run's configuration.
        path: the source of the values, for messages.
        values: of the learner's state_dict.
        changes: as for `load_learner`.

    Returns:
        The configuration with the changes, and the learner.

    Raises:
        ValueError: as `load_learner`.
    """
    config = _judged(own, changes)
    learner = build_learner(config, rated=own.steps)
    try:
        checkpoint.restore_learner(path, learner, values)
    except ValueError:
        _check_changes(own, changes, path, values)
        raise
    return config, learner


def evaluate_run(
    run: RunFolder,
    *,
    split: str = "test",
    name: str = "best",
    tasks: int = 1000,
    seed: int = EVALUATION_SEED,
    save: bool = True,
    group: ProcessGroup | None = None,
    **changes: Any,
) -> RunScore:
    """Score one checkpoint of a run, and write eval-SPLIT-NAME.json into the run folder.

    Args:
        run: the run folder.
        split: train, validation or test.
        name: best or last.
        tasks: length of the list of tasks.
        seed: seed of the list of tasks.
        save: false leaves the writing to `RunScore.save`: a score outlives a folder that cannot be written.
        group: the ranks that share the tasks; each gets the whole score, the first writes it.
        changes: options that differ from the run's: steps (0 scores the unadapted network), shots, queries, device.
            One that changes the score becomes part of the file's name: eval-test-best-steps=10.json.

    Returns:
        The score.

    Raises:
        ValueError: a file or an argument is at fault; the message names it.
        TypeError: a value has another type.
        OSError: the file cannot be written; the message names it.
    """
    check_count("seed", seed, 0)
    ranks = Ranks(group)
    ranks.place(changes.get("device", Config.load(run.config).device))
    # Before loading: a checkpoint that is replaced in between has another digest.
    digest = checkpoint.digest(run.checkpoint(name)) if run.checkpoint(name).exists() else ""
    config, learner, progress = load_learner(run, name, **changes)
    own = Config.load(run.config)
    apart = _changed(own, config)
    _check_data(own, config, progress)
    ranks.compare({**config.to_dict(), **versions(), "checkpoint": digest})
    if config.threads:
        torch.set_num_threads(config.threads)
    family = build_family(config, split, seed=seed)
    with convolution_precision(config.precision):
        scores = evaluate(
            learner, family, tasks=tasks, batch=config.meta_batch, workers=config.workers, progress=True, group=group
        )
    interval, used = mean_interval(scores.scores), settings(config)
    content: dict[str, Any] = {
        "measure": config.measure,
        "mean": interval.mean,
        "interval": interval.half,
        "checkpoint": name,
        "iteration": progress.iteration,
        "checkpoint_digest": digest,
        "settings": used,
        "changes": apart,
        "task_list": {"dataset": config.dataset, "split": split, "seed": seed, "tasks": tasks, "digest": scores.digest},
        "scores": scores.scores.tolist(),
    }
    path = run.evaluation(split, name, **apart)
    score = RunScore(config.measure, interval, tasks, progress.iteration, used, apart, True, path, content)
    if save and ranks.first:
        score.save()
    return score


def _check_data(own: Config, config: Config, progress: Progress) -> None:
    """Raise ValueError if the data set lies elsewhere than in training, and differs there."""
    root = config.values.get("data_root")
    if root is None or root == own.values["data_root"]:
        return
    same = own.changed(data_root=root, cache=config.values.get("cache"), device=config.device)
    if fingerprint(build_family(same, "validation", seed=EVALUATION_SEED)) != progress.data:
        raise ValueError(
            f"data_root: expected the data that the run was trained on, got other data in {root}; "
            "kfo_ext.trainer.evaluate scores a learner on any tasks"
        )


def compare_runs(
    a: RunFolder, b: RunFolder, *, split: str = "test", name: str = "best", **changes: Any
) -> tuple[RunScore, RunScore, Interval]:
    """Compute the paired difference a - b of two evaluated runs; `RunScore.differing_settings` lists other differences.

    Args:
        a: one run folder.
        b: the other one.
        split: the split of the evaluation to read from both folders.
        name: the checkpoint of that evaluation.
        changes: as given to `evaluate_run`, for both.

    Returns:
        Both scores, and the difference with its 95 % interval.

    Raises:
        ValueError: a run is not evaluated with these changes, or as `compare_scores`.
    """
    ours, theirs = (_read(run, split, name, changes) for run in (a, b))
    return ours, theirs, compare_scores(ours, theirs)


def compare_scores(ours: RunScore, theirs: RunScore) -> Interval:
    """Compute the paired difference of two scores over their common list of tasks.

    Args:
        ours: one score.
        theirs: the score that is subtracted.

    Returns:
        The difference with its 95 % interval.

    Raises:
        ValueError: the measures or tasks differ, or an option that was changed for the evaluation of one of them
            differs.
    """
    if ours.measure != theirs.measure:
        raise ValueError(f"{theirs.path}: expected the measure {ours.measure}, got {theirs.measure}")
    names = {**ours.changes, **theirs.changes}
    if apart := _apart(*({name: score.settings.get(name) for name in names} for score in (ours, theirs))):
        raise ValueError(
            f"{ours.path} and {theirs.path} were evaluated with different settings ({apart}); evaluate both alike"
        )
    if apart := _apart(ours.content["task_list"], theirs.content["task_list"]):
        raise ValueError(f"{ours.path} and {theirs.path} were evaluated on different tasks ({apart})")
    return paired_difference(ours.content["scores"], theirs.content["scores"])


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {a.get(key)} and {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key))


def _judged(own: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration that a run is evaluated with."""
    known = options_in_effect(own.values)
    for name in changes:
        if name in known and known[name].role == TRAINING:
            raise ValueError(f"{name}: has no effect on an evaluation")
    plain = {name: value for name, value in _PLAIN.items() if name in known}
    config = own.changed(**{**plain, **changes})
    if own.values.get("per_step") and config.values.get("per_step") and config.steps > own.steps:
        raise ValueError(
            f"steps: expected at most {own.steps} as in training, since each has learned rates (per_step), "
            f"got {config.steps}"
        )
    return config


def _changed(own: Config, config: Config) -> dict[str, Any]:
    """The settings of an evaluation that are not the run's own."""
    usual = settings(own)
    return {name: value for name, value in settings(config).items() if name not in usual or value != usual[name]}


def _check_changes(own: Config, changes: Mapping[str, Any], path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError for the first change that by itself requires parameters that the checkpoint does not have."""
    if _misfit(own, {}, path, state):
        return
    for name, value in changes.items():
        if reason := _misfit(own, {name: value}, path, state):
            raise ValueError(
                f"{name}: expected {own.values[name]} as in training, on which the trained parameters depend, "
                f"got {value} ({reason})"
            )


def _misfit(own: Config, changes: Mapping[str, Any], path: Path, state: Mapping[str, Any]) -> str:
    """The reason why the learner of a changed configuration cannot take a checkpoint's parameters; '' if it can."""
    try:
        checkpoint.restore_learner(path, build_learner(_judged(own, changes), rated=own.steps), state)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def _read(run: RunFolder, split: str, name: str, changes: Mapping[str, Any]) -> RunScore:
    saved, own = run.checkpoint(name), Config.load(run.config)
    config = _judged(own, changes)
    apart = _changed(own, config)
    path = run.evaluation(split, name, **apart)
    if not path.exists():
        options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in changes.items())
        command = f"{program()} eval {run.path} --split {split} --checkpoint {name}{options}"
        others = sorted(other.name for other in run.evaluations(split, name))
        there = f"; there is {', '.join(others)}, of other settings" if others else ""
        raise ValueError(f"{path}: not evaluated yet; run `{command}`{there}")
    content = read_json(path)
    if reason := fault(content, split, name):
        raise ValueError(f"{path}: not an evaluation written by kfo ({reason}); evaluate the run again")
    if differing := _apart(settings(config), content["settings"]):
        raise ValueError(f"{path}: evaluated with other settings than asked for ({differing}); evaluate the run again")
    return RunScore(
        content["measure"],
        Interval(content["mean"], content["interval"]),
        content["task_list"]["tasks"],
        content["iteration"],
        content["settings"],
        apart,
        not saved.exists() or checkpoint.digest(saved) == content["checkpoint_digest"],
        path,
        content,
    )
