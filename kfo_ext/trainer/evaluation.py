"""Scores of a learner on a fixed list of tasks, their intervals, and the paired difference of two learners."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kfo_ext.runs.bars import progress_bar
from kfo_ext.tasks import Examples, TaskBatch, TaskFamily, batches
from kfo_ext.tasks.checks import check_count

from .ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The largest number of scores.
MOST_TASKS = 2**31 - 1
# Bytes of a digest.
_DIGEST = 16


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval under the normal approximation."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half:.4f}"


class Cancelled(Exception):
    """An evaluation was cancelled before it had all its scores."""


class Evaluation(NamedTuple):
    """Scores by task: losses (n,), metrics (n,) or None without a metric, and a digest of the tasks' own digests."""

    losses: Tensor
    metrics: Tensor | None
    digest: str

    @property
    def scores(self) -> Tensor:
        """The metrics (accuracies by default), or the losses if there is no metric."""
        return self.losses if self.metrics is None else self.metrics


class _Part(NamedTuple):
    """One rank's part of an evaluation: losses and metrics by batch, digests by task; `ended`: it was cancelled."""

    ended: bool
    losses: list[Tensor]
    metrics: list[Tensor]
    digests: list[bytes]


def mean_interval(values: Sequence[float] | Tensor) -> Interval:
    """Compute the mean and 1.96 * std / sqrt(n).

    Args:
        values: (n,) independent scores.

    Returns:
        The mean with its 95 % interval.

    Raises:
        ValueError: there are fewer than two values, or more dimensions than one.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values: expected at least two scores in one dimension, got shape {tuple(values.shape)}")
    return Interval(values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values)))


def paired_difference(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor) -> Interval:
    """Compute the mean of a - b over the same tasks, with its 95 % interval.

    Args:
        a: (n,) scores of one learner.
        b: (n,) scores of another learner, on the same list of tasks in the same order.

    Returns:
        The mean difference with its interval.

    Raises:
        ValueError: the lengths differ.
    """
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if a.shape != b.shape:
        raise ValueError(f"b: expected the scores of the same {len(a)} tasks, got {len(b)}")
    return mean_interval(a - b)


def evaluate(
    learner: nn.Module,
    family: TaskFamily,
    *,
    tasks: int = 1000,
    batch: int = 16,
    steps: int | None = None,
    workers: int = 0,
    progress: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Adapt the learner to tasks 0 .. tasks - 1 of a family and score it on their queries.

    Each task is a meta-batch of one, so that the list of tasks does not depend on `batch`. Modules are in eval mode
    meanwhile, so that dropout is off, in the inner loop too. Batch norms stay as they are: they take the statistics of
    the examples, in evaluation as in training.

    Args:
        learner: MAML or ANIL; its parameters give dtype and device.
        family: a task family of the split to evaluate on.
        tasks: n, the length of the list.
        batch: tasks adapted at a time.
        steps: inner steps, as many as the learner was built with by default.
        workers: threads that prefetch tasks; 0 samples in the caller's thread.
        progress: show a bar on a terminal or in a notebook.
        cancelled: called before each batch; once true, the evaluation ends, on all ranks of a group.
        group: the ranks that share the batches of the list; each gets the scores of the whole list.

    Returns:
        The scores of all tasks.

    Raises:
        ValueError: there are fewer than two tasks, too many, or the batch is empty.
        TypeError: a number is not an int.
        FloatingPointError: a loss is not finite.
        Cancelled: `cancelled` was true.
        LostRank: another rank has ended.
    """
    check_count("tasks", tasks, 2)
    if tasks > MOST_TASKS:
        raise ValueError(f"tasks: expected at most {MOST_TASKS}, got {tasks}")
    check_count("batch", batch, 1)
    like = next(learner.parameters())
    ranks = Ranks(group)
    # Whole batches, as in one process: the scores are bitwise equal.
    starts = range(0, tasks, batch)[ranks.part(-(-tasks // batch))]
    digests: list[bytes] = []
    losses, metrics = [], []
    ended = False
    stream = batches(family, 1, start=starts.start, workers=workers)
    with closing(stream), torch.no_grad(), _scoring(learner):
        for start in progress_bar(starts, shown=progress and ranks.first, unit="batch"):
            if ended := cancelled():
                break
            joined = _joined(list(islice(stream, min(batch, tasks - start))))
            on_cpu = joined.to("cpu")
            result = learner(joined.to(like.device, like.dtype), steps)
            # Computed here, a device works in the meantime.
            digests += _digests(on_cpu)
            try:
                result.check_finite()
            except FloatingPointError as error:
                last = start + len(on_cpu.support.x) - 1
                raise FloatingPointError(f"tasks {start} to {last} of the list: {error}") from None
            losses.append(result.query_losses.double().cpu())
            if result.metrics is not None:
                metrics.append(result.metrics.double().cpu())
    parts = ranks.gathered(_Part(ended, losses, metrics, digests))
    if any(part.ended for part in parts):
        raise Cancelled
    losses = [X for part in parts for X in part.losses]
    metrics = [X for part in parts for X in part.metrics]
    digest = hashlib.blake2b(b"".join(one for part in parts for one in part.digests), digest_size=_DIGEST).hexdigest()
    return Evaluation(torch.cat(losses), torch.cat(metrics) if len(metrics) == len(losses) else None, digest)


@contextmanager
def _scoring(learner: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode but those that would then normalise by running statistics, which mix tasks."""
    changed = [
        each
        for each in learner.modules()
        if each.training and not isinstance(getattr(each, "running_mean", None), Tensor)
    ]
    for each in changed:
        each.training = False
    try:
        yield
    finally:
        for each in changed:
            each.training = True


def fingerprint(family: TaskFamily) -> str:
    """A digest of a family's first task, which differs for other data or options."""
    return _digests(family.sample(0, 1).to("cpu"))[0].hex()


def _digests(batch: TaskBatch) -> list[bytes]:
    """The digest of each task of a batch on the CPU."""
    digests = []
    for task in zip(*batch.support, *batch.query, strict=True):
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for tensor in task:
            digest.update(tensor.contiguous().numpy())
        digests.append(digest.digest())
    return digests


def _joined(group: list[TaskBatch]) -> TaskBatch:
    supports, queries = zip(*group, strict=True)
    return TaskBatch(*(Examples(*map(torch.cat, zip(*part, strict=True))) for part in (supports, queries)))
