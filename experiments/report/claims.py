"""Verdicts on the paper's statements from the results."""

from __future__ import annotations

from typing import NamedTuple

from ..intervals import REPRODUCED, REVERSED, UNDECIDED
from ..registry.claims import Claim
from .outcomes import Book, Row, paired
from .statistics import Summary, summary

NOT_RUN = "not run"
# With fewer seeds, the interval over seeds is too uncertain.
LEAST_SEEDS = 3


class Judged(NamedTuple):
    """A claim, the paired difference that decides it, and the verdict."""

    claim: Claim
    difference: Summary | None
    verdict: str


def verdict(difference: Summary | None) -> str:
    """Decide the claim that a paired difference is above 0.

    Args:
        difference: None without results.

    Returns:
        The verdict.
    """
    if difference is None:
        return NOT_RUN
    if difference.n < LEAST_SEEDS or difference.seeds is None or abs(difference.mean) <= difference.seeds:
        return UNDECIDED
    return REPRODUCED if difference.mean > 0 else REVERSED


def judged(claim: Claim, book: Book) -> Judged:
    """The verdict on a claim."""
    scores = paired(*([book.row(name) for name in names] for names in (claim.better, claim.worse)))
    difference = summary(scores) if scores else None
    return Judged(claim, difference, verdict(difference))


class Off(NamedTuple):
    """A published number outside the interval of ours.

    Attributes:
        row: our row.
        where: the place of the paper's number.
        points: ours minus the paper's, in percentage points.
    """

    row: Row
    where: str
    points: float


def off(book: Book) -> list[Off]:
    """The rows whose published number is farther from ours than the larger of our intervals."""
    found = []
    for row in book.rows:
        accuracy = row.accuracy()
        for number in row.entry.published:
            if accuracy is None or number.value is None:
                continue
            points = 100 * accuracy.mean - number.value
            if abs(points) > 100 * accuracy.larger:
                found.append(Off(row, number.where, points))
    return found
