"""The unit of work of a process: meta-training of one configuration up to an iteration, and scores after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Part of a result's key; to be increased when the same configuration gives other numbers.
NUMERICS = 1

Settings = Mapping[str, Any]


def digest(value: Any) -> str:
    """A short name of plain values, the same for equal values."""
    text = json.dumps([NUMERICS, value], sort_keys=True, default=dict, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Test:
    """Scores of a checkpoint on a seeded list of tasks of unseen classes.

    Attributes:
        tasks: number of tasks.
        checkpoint: best (on validation classes) or last.
        changes: options that differ from training, such as steps.
        split: the split of the classes.
    """

    tasks: int
    checkpoint: str = "best"
    changes: Settings = field(default_factory=dict)
    split: str = "test"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, to be trained up to `iterations`.

    Attributes:
        settings: options of `kfo_ext.trainer.Config`, without those of the machine and `iterations`; `inner_lr` is
            `fast_lr` here.
        iterations: meta-iterations from the start of the run.
        tests: the tests after it.
    """

    settings: Settings
    iterations: int
    tests: tuple[Test, ...] = ()

    @property
    def key(self) -> str:
        """The name of the run, which does not depend on its length."""
        return digest(self.settings)

    def done_in(self, records: Mapping[str, Record]) -> bool:
        """Whether a record holds all results of the job."""
        record = records.get(self.key)
        if record is None or not record.reached(self.iterations):
            return False
        # A run that ended before its first validation has no checkpoint to test.
        return not record.at or all(record.has(test) for test in self.tests)


@dataclass(kw_only=True)
class Record:
    """The results of a run.

    Attributes:
        settings: the job's settings.
        iterations: the number of iterations done.
        ended: the reason why it ended early, such as a loss that is not finite; "" if it did not.
        at: the iteration of each validation.
        accuracy: the mean accuracy of each validation.
        interval: half of its 95 % interval over tasks.
        training: the mean training accuracy of the meta-iterations since the previous validation.
        seconds: wall-clock seconds of meta-training, including validations, on one thread; other processes, and time
            in which the process was stopped, lengthen it.
        environments: indices of the environments in the result file.
        tests: fields of `Test`, iteration of the checkpoint, mean, interval, and `correct`, see `encoded`; `failure`
            holds the reason if there are none, such as a loss that is not finite.
    """

    settings: Settings
    iterations: int
    ended: str = ""
    at: list[int]
    accuracy: list[float]
    interval: list[float]
    training: list[float]
    seconds: float
    environments: list[int] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)

    def reached(self, iterations: int) -> bool:
        """Whether the run has done so many iterations, or ended early."""
        return self.iterations >= iterations or bool(self.ended)

    def best(self, iterations: int) -> float:
        """The best validation up to an iteration; 0 without one."""
        return max((score for at, score in zip(self.at, self.accuracy) if at <= iterations), default=0.0)

    def has(self, test: Test) -> bool:
        """Whether the record has a test's result."""
        return any(_is(found, test) for found in self.tests)

    def test(self, test: Test) -> dict[str, Any]:
        """Look up the result of a test.

        Args:
            test: the test.

        Returns:
            Its result.

        Raises:
            KeyError: the record does not have it.
        """
        for found in self.tests:
            if _is(found, test):
                return found
        raise KeyError(f"{test} of {dict(self.settings)}")


def identity(found: Mapping[str, Any]) -> Test:
    """The test of a result."""
    return Test(**{part.name: found[part.name] for part in fields(Test)})


def _is(found: Mapping[str, Any], test: Test) -> bool:
    return all(found[name] == value for name, value in asdict(test).items())


FIRST = ord("A")


def encoded(scores: Sequence[float], queries: int) -> str:
    """Encode accuracies as one letter per task: A is no query right, B one, and so on.

    Result files store them for paired differences of any two results.

    Args:
        scores: the accuracies.
        queries: the number of queries per task.

    Returns:
        The letters.

    Raises:
        ValueError: there are more queries than letters, or an accuracy is no fraction of queries.
    """
    if queries > 57:
        raise ValueError(f"queries: expected at most 57 of a task, got {queries}")
    counts = [round(score * queries) for score in scores]
    if any(abs(count / queries - score) > 1e-6 for count, score in zip(counts, scores)):
        raise ValueError(f"scores: expected shares of {queries} queries")
    return "".join(chr(FIRST + count) for count in counts)


def decoded(letters: str, queries: int) -> list[float]:
    """Accuracies from `encoded`."""
    return [(ord(letter) - FIRST) / queries for letter in letters]
