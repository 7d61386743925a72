"""Checks of single values, without torch; messages name the argument, the expected and the received value."""

from __future__ import annotations

import math

SPLITS = ("train", "validation", "test")


def check_split(split: str) -> str:
    """The split's name, or ValueError."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return split


def check_count(name: str, value: int, low: int, high: int | None = None, limit: str = "") -> int:
    """Check an integer.

    Args:
        name: the argument's name, for messages.
        value: its value.
        low: the least value allowed.
        high: the largest value allowed; None for no bound.
        limit: the reason for `high`, for messages.

    Returns:
        The value.

    Raises:
        TypeError: the value is no int.
        ValueError: it lies outside [low, high].
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {bounds}{f' ({limit})' if limit else ''}, got {value}")
    return value


def check_number(name: str, value: float, low: float) -> float:
    """The number, or TypeError if it is none, ValueError if it is not finite or below `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name}: expected a finite number of at least {low}, got {value}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, or ValueError if it is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value
