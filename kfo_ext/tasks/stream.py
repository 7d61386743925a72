"""The seeded stream of meta-batches, with or without prefetching by threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch

from kfo_ext.tasks.batch import TaskBatch, TaskFamily
from kfo_ext.tasks.checks import check_count


def batches(family: TaskFamily, tasks: int, start: int = 0, workers: int = 0) -> Generator[TaskBatch, None, None]:
    """Return the endless stream of meta-batches `start`, `start + 1`, ..., the same for any number of workers.

    Args:
        family: the task family.
        tasks: tasks per meta-batch.
        start: index of the first meta-batch, so that a run resumes where it stopped.
        workers: threads that prefetch, with one torch thread each; 0 samples in the caller's thread.

    Returns:
        A generator; closing it (or an error in a worker, raised here) ends its threads.

    Raises:
        TypeError: a count is no integer.
        ValueError: a count is out of range.
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
    halves: Any = family
    ahead, finish = (halves.draw, halves.batch) if _has_halves(family) else (family.sample, _as_it_is)
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
    """Workers with one torch thread each: teams of threads would compete with the consumer's for the cores."""
    threads, started = torch.get_num_threads(), Barrier(count + 1)

    def work_alone() -> None:
        try:
            # torch initializes a thread's setting at its first call, which would overwrite a number set earlier.
            torch.get_num_threads()
            torch.set_num_threads(1)
        except BaseException:
            started.abort()
            raise
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="kfo-tasks", initializer=work_alone)
    try:
        for _ in range(count):
            # Starts a thread, as none is idle until all have started.
            pool.submit(int)
        started.wait()
    except BaseException:
        started.abort()
        pool.shutdown()
        raise
    finally:
        # The workers have also set the default of new threads.
        torch.set_num_threads(threads)
    return pool


def _has_halves(family: TaskFamily) -> bool:
    """Whether one class defines sample, draw and batch: a subclass that overrides one of them may be inconsistent."""
    functions = {name: getattr(getattr(family, name, None), "__func__", None) for name in ("sample", "draw", "batch")}
    return any(
        all(function is not None and vars(owner).get(name) is function for name, function in functions.items())
        for owner in type(family).__mro__
    )


def _as_it_is(batch: TaskBatch) -> TaskBatch:
    return batch
