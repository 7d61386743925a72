"""Options: their allowed values, and what they affect. No torch, since the help of the command line lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kfo_ext.choices import LARGEST_INTEGER
from kfo_ext.runs.files import is_number

# The effect of an option on the evaluation of a given checkpoint on given tasks. SCORE: its score. MACHINE: where and
# how fast it is computed, and only rounding besides. TRAINING: nothing.
SCORE, TRAINING, MACHINE = "score", "training", "machine"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        kind: bool, int, float or str.
        default: its value if none is given. None: it may have no value. A function computes it from the options
            before it, and `shown` describes the result in a few words.
        help: its text in `kfo train --help`.
        choices: the allowed strings; () allows any.
        least: the smallest allowed number.
        most: the largest allowed integer.
        positive: whether a number must be above 0.
        role: SCORE, TRAINING or MACHINE.
        resumable: whether a resumed run may change it.
        required: whether it must be given.
        shown: the default in a help text, if it is computed.
    """

    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int = LARGEST_INTEGER
    positive: bool = False
    role: str = SCORE
    resumable: bool = False
    required: bool = False
    shown: str = ""

    @property
    def shown_default(self) -> str:
        """The default as in a help text."""
        if self.required:
            return "must be given"
        return self.shown or ("none" if self.default is None else str(self.default))

    def value(self, name: str, given: Any, before: Mapping[str, Any]) -> Any:
        """Check a value, or compute the default.

        Args:
            name: of the option, for messages.
            given: the value; None if none was given and the default is None or computed.
            before: the values of the options before this one.

        Returns:
            The checked value.

        Raises:
            TypeError: the value has another type; the message names the option, the expected and the received value.
            ValueError: the value is not allowed; the message is as for TypeError.
        """
        if given is None and callable(self.default):
            given = self.default(before)
        if given is None and self.default is None:
            return None
        self._check(name, given)
        return given

    def _check(self, name: str, value: Any) -> None:
        expected: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, expected) or (isinstance(value, bool) and self.kind is not bool):
            raise TypeError(f"{name}: expected {self.kind.__name__}, got {value!r}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name}: expected one of {', '.join(self.choices)}, got {value!r}")
        if self.least is not None and not (value >= self.least and is_number(value)):
            number = "a finite number of at least" if self.kind is float else "at least"
            raise ValueError(f"{name}: expected {number} {self.least}, got {value}")
        if isinstance(value, int) and value > self.most:
            raise ValueError(f"{name}: expected at most {self.most}, got {value}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{name}: expected text without null characters, got {value!r}")
        if self.positive and not (value > 0 and is_number(value)):
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def _fit_together(values: Mapping[str, Any]) -> None:
    del values


@dataclass(frozen=True, kw_only=True)
class Part:
    """A row of a table: one data set, network, method, update, optimizer or schedule.

    Attributes:
        help: what it is, in a few words.
        options: those that belong to it, by name.
        defaults: this part's own defaults of options that belong to something else.
        check: of the values of all options; raises ValueError if some do not fit together.
    """

    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = _fit_together
