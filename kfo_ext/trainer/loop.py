"""Meta-training: outer steps, validation, best checkpoint, exact resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kfo_ext.machine import versions
from kfo_ext.runs import checkpoint
from kfo_ext.runs.bars import TrainingBar
from kfo_ext.runs.loggers import checked, opened
from kfo_ext.runs.metrics import Logger, Metrics, Record, Unwritten
from kfo_ext.runs.plots import plot_runs
from kfo_ext.runs.progress import Progress
from kfo_ext.runs.run_folder import RunFolder
from kfo_ext.tasks import TaskBatch, batches

from .captured_step import CapturedMetaStep
from .config import Config, difference
from .evaluation import Cancelled, Evaluation, evaluate, fingerprint, mean_interval
from .meta_step import MetaStep
from .precision import convolution_precision
from .ranks import Ranks
from .recipe import EVALUATION_SEED, build_family, build_learner, build_optimizer
from .schedules import meta_rate
from .signals import stop_requested

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Why training ends; of several ranks' reasons the last in this order counts, and "" continues.
REASONS = ("", "time budget", "patience", "finished", "interrupted")
# What helps where training diverges after many meta-iterations.
STABLE = "--clip-norm 1, --schedule half_life --meta-lr-half-life 500"

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Why training ended (finished, patience, time budget or interrupted), and its progress."""

    reason: str
    progress: Progress


class Trainer:
    """Meta-trains the learner of one configuration in one run folder.

    Args:
        config: what to train.
        run: folder for the config, metrics, checkpoints and picture of the run; None makes a new one in runs/.
        group: the ranks that train together, each with its own trainer and the same calls; without it this process
            trains alone, even if a group is initialised. They share the tasks of each meta-batch and of each
            validation; only the first reads and writes the folder.

    Raises:
        ValueError: options do not fit together here, or the options, versions or data of a rank differ from those of
            rank 0; the message names the first such rank.
        LostRank: another rank has ended; in every call.
    """

    def __init__(self, config: Config, run: RunFolder | None = None, *, group: ProcessGroup | None = None) -> None:
        if config.steps < 1:
            raise ValueError(f"steps: expected at least 1 to train with, got {config.steps}")
        self.ranks = Ranks(group)
        self._check_ranks(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        # Digest of the last checkpoint that this trainer wrote or read; None before the first one.
        self._saved: str | None = None
        self._clock, self._deadline = 0.0, math.inf
        self.tasks = build_family(config, "train", seed=config.seed)
        self.validation_tasks = build_family(config, "validation", seed=EVALUATION_SEED)
        self.progress = Progress(data=fingerprint(self.validation_tasks))
        self.learner = build_learner(config)
        self.ranks.compare({**config.to_dict(), **versions(), "data": self.progress.data})
        self.ranks.equalise([*self.learner.parameters(), *self.learner.buffers()])
        self.optimizer = build_optimizer(config, self.learner)
        self.meta_step = self._meta_step(group)
        # Last: a failure above leaves no folder.
        title = f"{config.dataset}-{config.method}-{config.update}"
        self.run = RunFolder(self.ranks.from_first(lambda: RunFolder.make(title).path)) if run is None else run

    @classmethod
    def start(
        cls, config: Config, path: str | PathLike[str] | None = None, *, group: ProcessGroup | None = None
    ) -> Trainer:
        """Begin a new run.

        Args:
            config: as for the class.
            path: an absent or empty folder; None makes a new one in runs/.
            group: as for the class.

        Returns:
            The trainer.

        Raises:
            ValueError: the folder is taken, or the tasks or the device are not available, or as the class.
        """
        if path is not None and Ranks(group).first:
            RunFolder(path).check_free(Config.load)
        trainer = cls(config, None if path is None else RunFolder(path), group=group)
        trainer._begin()
        return trainer

    @classmethod
    def resume(cls, path: str | PathLike[str], *, group: ProcessGroup | None = None, **changes: Any) -> Trainer:
        """Continue a run from its last checkpoint, exactly as if it had not been stopped.

        Args:
            path: the run folder.
            group: as for the class; of any size, whatever that was when the run was stopped.
            changes: new values of options that are resumable, such as more iterations.

        Returns:
            The trainer.

        Raises:
            ValueError: the run or its checkpoint cannot be used (the message names the file), another writer is active,
                or as the class.
        """
        ranks = Ranks(group)
        run = RunFolder.open(path) if ranks.first else RunFolder(path)
        with run.writing() if ranks.first else nullcontext():
            values, state = ranks.from_first(lambda: _read(run))
            config = Config.from_dict(values, str(run.config)).changed(**changes)
            if state is None:
                trainer = cls(config, run, group=group)
                trainer._save()
            else:
                trainer = cls._restored(config, run, state, group)
            if ranks.first:
                config.save(run.config)
        return trainer

    def fit(self, *, time_budget: float = 0.0, loggers: Iterable[str | Logger] = ()) -> Outcome:
        """Train until the iterations are done, the patience or the time is exhausted, or a signal requests a stop.

        A validation follows every `validation_every` iterations and the last one; each is followed by a save. The run
        folder is locked meanwhile. A trainer that was neither started nor resumed begins a new run in it.

        Args:
            time_budget: seconds of this call, excluding the last validation; 0 is no limit.
            loggers: receive each record besides metrics.jsonl: functions of one record (a dict), or names of
                `kfo_ext.runs.loggers.LOGGERS`. An exception in one of them ends the call.

        Returns:
            Why training ended, and its progress.

        Raises:
            FloatingPointError: a value is not finite; the message names iteration, step and task of the first one. The
                checkpoints stay unchanged.
            ValueError: another writer is active, or has continued the run since.
            ImportError: a logger's package is not installed.
            LostRank: another rank has ended.
        """
        if not time_budget >= 0:
            raise ValueError(f"time_budget: expected seconds, at least 0, got {time_budget}")
        loggers = checked(loggers)
        if self._saved is None:
            self._begin()
        if not self.ranks.first:
            return self._fit(time_budget, ())
        with self.run.writing():
            if checkpoint.digest(self.run.last) != self._saved:
                raise ValueError(f"{self.run.last}: another trainer has written it since; go on with Trainer.resume")
            with opened(loggers, self.run, self.config.to_dict(), self.progress.iteration) as functions:
                return self._fit(time_budget, functions)

    def _check_ranks(self, config: Config) -> None:
        if config.meta_batch < self.ranks.size:
            raise ValueError(
                f"meta_batch: expected at least one task for each of {self.ranks.size} ranks, got {config.meta_batch}"
            )
        if config.cuda_graph and self.ranks.size > 1:
            raise ValueError(
                f"cuda_graph: expected one process, got {self.ranks.size} ranks: leave it out with several"
            )
        self.ranks.place(config.device)

    def _meta_step(self, group: ProcessGroup | None) -> MetaStep:
        if self.config.cuda_graph:
            return CapturedMetaStep(self.learner, self.optimizer, clip_norm=self.config.clip_norm)
        return MetaStep(self.learner, self.optimizer, clip_norm=self.config.clip_norm, group=group)

    def _begin(self) -> None:
        if not self.ranks.first:
            self._save()
            return
        self.run.check_free(Config.load)
        self.run.path.mkdir(parents=True, exist_ok=True)
        with self.run.writing():
            # Another process may have begun a run since the first check, which keeps the lock out of foreign folders.
            self.run.check_free(Config.load)
            self.run.remove_partials()
            self.run.remove_untrained()
            # Before the first checkpoint: a folder with only this file can be started again, or resumed.
            self.config.save(self.run.config)
            self._save()

    def _fit(self, time_budget: float, loggers: Iterable[Logger]) -> Outcome:
        begin = time.monotonic()
        self._deadline = begin + time_budget if time_budget else math.inf
        self._clock = begin - self.progress.elapsed
        start = self.progress.iteration * self.config.accumulate
        stream = batches(self.tasks, self.config.meta_batch, start=start, workers=self.config.workers)
        with (
            convolution_precision(self.config.precision),
            stop_requested(said=self.ranks.first) as stop,
            self._metrics(loggers) as metrics,
            self._bar() as bar,
            closing(stream),
        ):
            if self.ranks.first:
                self.run.record_environment()
            while True:
                # A signal or a clock may stop one rank an iteration before the others.
                ending = REASONS.index(self._ending(stop))
                reason = REASONS[self.ranks.largest(ending, self.config.device)]
                if reason != "interrupted" and self._validation_due(reason):
                    self._validate(metrics, bar, stop)
                elif reason:
                    break
                else:
                    self._step(stream, metrics, bar)
            metrics.sync()
            self._save()
        if self.ranks.first:
            plot_runs({self.run.path.name: self.run.metrics}, self.run.curve)
        return Outcome(reason, self.progress)

    def _bar(self) -> TrainingBar:
        done, shown = self.progress.iteration, self.ranks.first
        return TrainingBar(self.config.iterations, done, deadline=self._deadline, shown=shown)

    def _metrics(self, loggers: Iterable[Logger]) -> Metrics:
        if not self.ranks.first:
            return Unwritten()
        return Metrics(self.run.metrics, self.progress, self.config.validation_every, loggers)

    def _ending(self, stop: Callable[[], bool]) -> str:
        if stop():
            return "interrupted"
        if self.progress.iteration >= self.config.iterations:
            return "finished"
        if 0 < self.config.patience <= self.progress.stale:
            return "patience"
        return "time budget" if time.monotonic() >= self._deadline else ""

    def _validation_due(self, ending: str) -> bool:
        done = self.progress.iteration
        return done > self.progress.validated and (bool(ending) or done % self.config.validation_every == 0)

    def _step(self, stream: Iterator[TaskBatch], metrics: Metrics, bar: TrainingBar) -> None:
        config, iteration = self.config, self.progress.iteration + 1
        rate = meta_rate(config.schedule_row, self.progress.iteration, config.values)
        # The rate of a step belongs to the group with the largest rate.
        largest = max(1.0, (config.meta_lr_update or 0.0) / config.meta_lr)
        parts = [batch.to(config.device, config.torch_dtype) for batch in islice(stream, config.accumulate)]
        report = self.meta_step(parts, rate * largest).on_host()
        try:
            self.meta_step.check_finite(report)
        except FloatingPointError as error:
            late = f"; if it diverges late in training, also: {STABLE}" if iteration > 1 else ""
            raise FloatingPointError(f"iteration {iteration}: {error}{late}") from None
        self.progress.iteration = iteration
        self.progress.elapsed = time.monotonic() - self._clock
        record = {"iteration": iteration, "loss": report.loss.item()}
        if report.metric is not None:
            record["accuracy"] = report.metric.item()
        bar.show(record)
        metrics.append({**record, "learning_rate": rate, "elapsed": self.progress.elapsed})

    def _validate(self, metrics: Metrics, bar: TrainingBar, stop: Callable[[], bool]) -> None:
        bar.describe("validating")
        try:
            scores = evaluate(
                self.learner,
                self.validation_tasks,
                tasks=self.config.validation_tasks,
                batch=self.config.meta_batch,
                workers=self.config.workers,
                cancelled=stop,
                group=self.ranks.group,
            )
        except Cancelled:
            return
        except FloatingPointError as error:
            raise FloatingPointError(f"validation after iteration {self.progress.iteration}: {error}") from None
        finally:
            bar.describe()
        self.progress.elapsed = time.monotonic() - self._clock
        score, record = _summary(scores)
        metrics.append({"iteration": self.progress.iteration, **record, "elapsed": self.progress.elapsed})
        metrics.sync()
        due = self.progress.iteration % self.config.validation_every == 0
        if self.progress.record(score, due=due) and self.ranks.first:
            # Before last.pt: after a kill in between, training from last.pt reproduces this best.pt.
            checkpoint.save(self.run.best, self._state())
        self._save()

    def _save(self) -> None:
        # Not torch.distributed.checkpoint: the state is small, and every rank has all of it.
        self._saved = checkpoint.save(self.run.last, self._state()) if self.ranks.first else ""

    def _state(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if torch.device(self.config.device).type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.config.device)
        return {
            "config": self.config.to_dict(),
            "progress": asdict(self.progress),
            "learner": self.learner.state_dict(),
            "optimizer": checkpoint.optimizer_values(self.optimizer),
            "rng": rng,
        }

    @classmethod
    def _restored(cls, config: Config, run: RunFolder, state: dict[str, Any], group: ProcessGroup | None) -> Trainer:
        saved = Config.from_dict(state["config"], str(run.last))
        if mismatch := difference(config, saved):
            raise ValueError(f"{run.last}: the checkpoint is of another configuration ({mismatch})")
        trainer = cls(config, run, group=group)
        trainer._restore(state)
        return trainer

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.run.last
        here, self.progress = self.progress.data, Progress.from_dict(state["progress"], str(path))
        if self.progress.data != here:
            raise ValueError(f"{path}: the run began with other data than is there now; give it the same")
        best = self.progress.best_iteration
        if best and (reason := self.ranks.from_first(lambda: _unreadable(self.run.best))):
            if self.ranks.first:
                logger.warning("%s; it was of iteration %d; the next validation counts as the best", reason, best)
            self.progress.forget_best()
        checkpoint.restore_learner(path, self.learner, state["learner"])
        checkpoint.restore_optimizer(path, self.optimizer, state["optimizer"])
        rng: dict[str, Tensor] = state["rng"]
        try:
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.config.device)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: the checkpoint's random state is not valid ({error})") from None
        self._saved = checkpoint.digest(path) if self.ranks.first else ""


def _read(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The configuration of a run, and its last checkpoint; None if the run was stopped before the first one."""
    run.remove_partials()
    config = Config.load(run.config).to_dict()
    return config, None if run.unfinished(Config.load) else checkpoint.load(run.last)


def _unreadable(path: Path) -> str:
    """The reason why a checkpoint cannot be read; '' if it can."""
    try:
        checkpoint.digest(path)
    except ValueError as error:
        return str(error)
    return ""


def _summary(scores: Evaluation) -> tuple[float, Record]:
    """The score to select by (larger is better), and the record to write."""
    loss, half = mean_interval(scores.losses)
    record = {"validation_loss": loss, "validation_loss_interval": half}
    if scores.metrics is None:
        return -loss, record
    accuracy, half = mean_interval(scores.metrics)
    return accuracy, {"validation_accuracy": accuracy, "validation_interval": half, **record}
