"""Records as runs would give them, from functions of settings, iteration, seed and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from experiments.jobs import Job, Record, Test, encoded

# Validation accuracy of a setting at an iteration.
Curve = Callable[[Mapping[str, Any], int], float]
# Right answers of QUERIES to a task, from setting, test and number of the task.
Right = Callable[[Mapping[str, Any], Test, int], int]
QUERIES = 25
EVERY = 100


def scored(tasks: int, **facts: Any) -> Test:
    """A `Test`, which pytest would take for one of its own in a test file."""
    return Test(tasks=tasks, **facts)


def record(job: Job, curve: Curve, right: Right = lambda *_: 20, ended: int = 0) -> Record:
    """The record of a job.

    ended: the iteration after which its loss was not finite; 0 if it was to the end.
    """
    last = ended or job.iterations
    at = list(range(EVERY, last + 1, EVERY))
    return Record(
        settings=dict(job.settings),
        iterations=last,
        ended=f"iteration {ended + 1}: loss is not finite" if ended else "",
        at=at,
        accuracy=[curve(job.settings, each) for each in at],
        interval=[0.01] * len(at),
        training=[curve(job.settings, each) for each in at],
        seconds=1.0,
        tests=[_test(job, test, at, right) for test in job.tests] if at else [],
    )


def _test(job: Job, test: Test, at: list[int], right: Right) -> dict[str, Any]:
    scores = [right(job.settings, test, task) / QUERIES for task in range(test.tasks)]
    return {
        **asdict(test),
        "iteration": at[-1],
        "mean": sum(scores) / len(scores),
        "interval": 0.01,
        "correct": encoded(scores, QUERIES),
        "queries": QUERIES,
    }
