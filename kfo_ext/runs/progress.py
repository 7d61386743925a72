"""The progress of a run: the part of its state that consists of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .files import is_count, is_number


@dataclass
class Progress:
    """Counters of a run.

    Attributes:
        iteration: meta-iterations done, which is also the index of the next one's meta-batches.
        validated: iteration of the last validation.
        elapsed: seconds of training and validation, over all parts of the run.
        best_iteration: iteration of the best validation; 0 if there is none.
        best_score: its accuracy, or minus its loss for regression; minus infinity if there is none.
        stale: validations since the best one; only those that were due count.
        data: a digest of the run's data, which distinguishes it from other data with the same options.
    """

    iteration: int = 0
    validated: int = 0
    elapsed: float = 0.0
    best_iteration: int = 0
    best_score: float = -math.inf
    stale: int = 0
    data: str = ""

    def record(self, score: float, *, due: bool = True) -> bool:
        """Count a validation of the present iteration.

        Args:
            score: accuracy, or minus the loss.
            due: false for a validation that only the end of a call caused; it does not count against the patience.

        Returns:
            Whether it is the best so far.
        """
        self.validated = self.iteration
        if not score > self.best_score:
            self.stale += due
            return False
        self.best_iteration, self.best_score, self.stale = self.iteration, score, 0
        return True

    def forget_best(self) -> None:
        """Make the next validation the best so far."""
        self.best_iteration, self.best_score, self.stale = 0, -math.inf, 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Progress:
        """Build the counters from a checkpoint's section.

        Args:
            values: the section.
            source: the file, for messages.

        Returns:
            The counters.

        Raises:
            ValueError: a counter is missing, or the numbers are not those of a run; the message names the source.
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
        # There is a finite best score exactly if there is a best validation.
        none = progress.best_score == -math.inf
        if not (none or is_number(progress.best_score)) or none != (progress.best_iteration == 0):
            raise wrong
        return progress
