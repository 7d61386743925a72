"""What a process computes at a time: meta-training of one configuration up to an iteration, and scores after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Part of what a result belongs to; to be raised when the same configuration gives other numbers than before.
NUMERICS = 1

Settings = Mapping[str, Any]


def digest(value: Any) -> str:
    """A short name of plain values: equal ones have the same."""
    text = json.dumps([NUMERICS, value], sort_keys=True, default=dict, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Test:
    """Scores of a checkpoint on a seeded list of tasks of unseen classes.

    tasks: length of the list.
    checkpoint: best (on validation classes) or last.
    changes: options otherwise than in training, such as steps.
    split: whose classes.
    """

    tasks: int
    checkpoint: str = "best"
    changes: Settings = field(default_factory=dict)
    split: str = "test"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, to be taken up to `iterations`.

    settings: options of `kfo_ext.trainer.Config`, those of the machine and `iterations` left out; `inner_lr` is
        `fast_lr` here.
    iterations: meta-iterations from the start of the run.
    tests: what is scored then.
    """

    settings: Settings
    iterations: int
    tests: tuple[Test, ...] = ()

    @property
    def key(self) -> str:
        """The name of the run, whatever its length."""
        return digest(self.settings)

    def done_in(self, records: Mapping[str, Record]) -> bool:
        """Whether a record holds all of it."""
        record = records.get(self.key)
        if record is None or not record.reached(self.iterations):
            return False
        # A run that ended before its first validation has no checkpoint to test.
        return not record.at or all(record.has(test) for test in self.tests)


@dataclass(kw_only=True)
class Record:
    """What a run has given.

    settings: as of the job.
    iterations: how far it came.
    ended: why it could not go on, such as a loss that is not finite; "" if it could.
    at, accuracy, interval: the validations: iteration, mean, half of the 95 % interval over tasks.
    training: the mean training accuracy of the meta-iterations since the validation before.
    seconds: of meta-training, validations included, on one thread.
    environments: numbers of the environments in the result file.
    tests: fields of `Test`, iteration of the checkpoint, mean, interval, and `correct`: see `encoded`;
        `failure` says why there are none, such as a loss that is not finite.
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
        """Whether it came so far, or as far as it can."""
        return self.iterations >= iterations or bool(self.ended)

    def best(self, iterations: int) -> float:
        """The best validation up to an iteration; 0 without one."""
        return max((score for at, score in zip(self.at, self.accuracy) if at <= iterations), default=0.0)

    def has(self, test: Test) -> bool:
        """Whether a test has been made."""
        return any(_is(found, test) for found in self.tests)

    def test(self, test: Test) -> dict[str, Any]:
        """What a test has given.

        Raises:
            KeyError: it has not been made.
        """
        for found in self.tests:
            if _is(found, test):
                return found
        raise KeyError(f"{test} of {dict(self.settings)}")


def identity(found: Mapping[str, Any]) -> Test:
    """The test that has given this."""
    return Test(**{part.name: found[part.name] for part in fields(Test)})


def _is(found: Mapping[str, Any], test: Test) -> bool:
    return all(found[name] == value for name, value in asdict(test).items())


FIRST = ord("A")


def encoded(scores: Sequence[float], queries: int) -> str:
    """Accuracies, task by task, as one letter each: A is none of the queries right, B one, and so on.

    Paired differences of any two results need them, and a letter is what they hold.

    Raises:
        ValueError: more queries than there are letters, or an accuracy that is not a number of queries.
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
