"""How far a run is: the part of its state that is plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .files import is_count, is_number


@dataclass
class Progress:
    """Counters of a run.

    iteration: meta-iterations done, which is also the index of the next one's meta-batches.
    validated: iteration of the last validation.
    elapsed: seconds of training and validation, over all parts of the run.
    best_iteration, best_score: of the best validation, by accuracy, or by minus the loss for regression; 0 is none.
    stale: validations since the best one, those between two due ones not counted.
    data: a digest of the run's data, which tells it apart from other data of the same options.
    """

    iteration: int = 0
    validated: int = 0
    elapsed: float = 0.0
    best_iteration: int = 0
    best_score: float = -math.inf
    stale: int = 0
    data: str = ""

    def record(self, score: float, *, due: bool = True) -> bool:
        """Count a validation; true if it is the best so far.

        due: false for one that only the end of a call brought about: it does not try the patience.
        """
        self.validated = self.iteration
        if not score > self.best_score:
            self.stale += due
            return False
        self.best_iteration, self.best_score, self.stale = self.iteration, score, 0
        return True

    def forget_best(self) -> None:
        """Let the next validation be the best so far."""
        self.best_iteration, self.best_score, self.stale = 0, -math.inf, 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Progress:
        """Build it from what a checkpoint holds.

        Raises: ValueError naming the source if it is not whole, or its numbers are of no run.
        """
        wrong = ValueError(f"{source}: the checkpoint's progress is not valid")
        if not isinstance(values, Mapping) or set(values) != {item.name for item in fields(cls)}:
            raise wrong
        progress = cls(**values)
        counts = (progress.stale, progress.best_iteration, progress.validated, progress.iteration)
        if not all(map(is_count, counts)) or not progress.best_iteration <= progress.validated <= progress.iteration:
            raise wrong
        if not isinstance(progress.data, str):
            raise wrong
        if not is_number(progress.elapsed) or progress.elapsed < 0:
            raise wrong
        # A best score belongs to a best validation, and minus infinity to none.
        none = progress.best_score == -math.inf
        if not (none or is_number(progress.best_score)) or none != (progress.best_iteration == 0):
            raise wrong
        return progress
