"""Meta-batches: what a task family yields, and the seeded stream of them."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")


class Examples(NamedTuple):
    """Labelled examples of T tasks.

    x: (T, n, ...) inputs; images are (T, n, C, H, W) float32 in [0, 1]
    y: (T, n) int64 labels, or (T, n, d) regression targets
    """

    x: Tensor
    y: Tensor


class TaskBatch(NamedTuple):
    """One meta-batch: every tensor has the leading task dimension T.

    support: the examples a task adapts on, ways * shots of them for classification
    query: the examples that judge the adapted parameters, ways * queries of them
    """

    support: Examples
    query: Examples

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """The batch on another device, its floating tensors in another dtype (integer labels keep theirs)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return TaskBatch(*(Examples(move(part.x), move(part.y)) for part in self))

    def split(self, tasks: int) -> list[TaskBatch]:
        """Batches of so many tasks each, the last of what is left."""
        tensors = [tensor.split(tasks) for part in self for tensor in part]
        return [TaskBatch(Examples(*each[:2]), Examples(*each[2:])) for each in zip(*tensors)]


class TaskFamily(Protocol):
    """Where tasks come from: a pure function of its constructor's arguments, `index` and `tasks`.

    A class may also define, together with sample, two halves of it: sample(index, tasks) == batch(draw(index, tasks)).
    Workers then call draw alone, which stays on the CPU, and the thread that takes the stream calls batch: what that
    does on a device goes to this thread's current stream, and no worker disturbs a CUDA graph's capture. Of a family
    without them workers call sample; on a device that would use the worker's own current stream, the device's default.
    """

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`, of `tasks` tasks."""
        ...


def batches(family: TaskFamily, tasks: int, start: int = 0, workers: int = 0) -> Generator[TaskBatch, None, None]:
    """The endless stream of meta-batches `start`, `start + 1`, ..., the same for any number of workers.

    family: the task family
    tasks: tasks per meta-batch
    start: index of the first meta-batch, so that a run resumes where it stopped
    workers: threads that sample ahead, with one thread of torch each; 0 samples in the caller's thread
    out: a generator; closing it (or an error in a worker, raised here) ends its threads

    Raises: ValueError or TypeError for a count out of range.
    """
    check_count("tasks", tasks, 1)
    check_count("start", start, 0)
    check_count("workers", workers, 0)
    indices = itertools.count(start)
    if workers == 0:
        return (family.sample(index, tasks) for index in indices)
    return _sampled_ahead(family, tasks, indices, workers)


def _sampled_ahead(
    family: TaskFamily, tasks: int, indices: Iterator[int], workers: int
) -> Generator[TaskBatch, None, None]:
    ahead, finish = (family.draw, family.batch) if _has_halves(family) else (family.sample, _as_it_is)
    pool = _workers(workers)
    try:
        pending = deque(pool.submit(ahead, next(indices), tasks) for _ in range(2 * workers))
        while True:
            drawn = pending.popleft().result()
            pending.append(pool.submit(ahead, next(indices), tasks))
            yield finish(drawn)
    finally:
        pool.shutdown(cancel_futures=True)


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads in which torch's operations run alone: teams of threads would fight with the consumer's for the cores."""
    threads, started = torch.get_num_threads(), Barrier(count + 1)

    def work_alone() -> None:
        try:
            # Torch sets a thread up when it first asks; a number set before would then be overwritten.
            torch.get_num_threads()
            torch.set_num_threads(1)
        except BaseException:
            started.abort()
            raise
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="kfo-tasks", initializer=work_alone)
    try:
        for _ in range(count):
            # Starts a thread, as none is idle before all have started.
            pool.submit(int)
        started.wait()
    except BaseException:
        started.abort()
        pool.shutdown()
        raise
    finally:
        # The workers have also set the number for threads to come.
        torch.set_num_threads(threads)
    return pool


def _has_halves(family: TaskFamily) -> bool:
    """Whether one class defines sample, draw and batch: in a subclass that changes one of them they may differ."""
    functions = {name: getattr(getattr(family, name, None), "__func__", None) for name in ("sample", "draw", "batch")}
    return any(
        all(function is not None and vars(owner).get(name) is function for name, function in functions.items())
        for owner in type(family).__mro__
    )


def _as_it_is(batch: TaskBatch) -> TaskBatch:
    return batch


def generator_for(seed: int, *stream: int | str) -> torch.Generator:
    """A fresh CPU generator for one named stream, seeded by a hash that no platform or process changes.

    seed: the run's seed
    stream: what tells this stream from the others, say a split's name and an index

    torch seeds the CPU generator with 32 bits: among n streams about n^2 / 2^33 pairs coincide.
    """
    digest = hashlib.blake2b(repr((operator.index(seed), *stream)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def check_split(split: str) -> str:
    """The split's name, or ValueError."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return split


def check_count(name: str, value: int, low: int, high: int | None = None, limit: str = "") -> int:
    """The count, or TypeError if it is no int, ValueError if it lies outside [low, high].

    limit: what sets `high`, for the message
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {bounds}{f' ({limit})' if limit else ''}, got {value}")
    return value
