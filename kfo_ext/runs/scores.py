"""eval-*.json: checks that a file is a score that `kfo eval` has written. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .files import is_count, is_number


def fault(content: Any, split: str, name: str) -> str:
    """Find what is wrong with the content of an evaluation file.

    Args:
        content: the parsed JSON.
        split: the split of classes that the tasks are drawn from.
        name: of the checkpoint, best or last.

    Returns:
        The fault in a few words; '' if there is none.
    """
    if not isinstance(content, dict):
        return "no object"
    listed, scores = content.get("task_list"), content.get("scores")
    if not isinstance(listed, dict) or not all(isinstance(content.get(key), dict) for key in ("settings", "changes")):
        return "no task list, settings or changes"
    if (listed.get("split"), content.get("checkpoint")) != (split, name):
        return "of another split or checkpoint"
    if content.get("measure") not in ("accuracy", "loss") or not is_count(content.get("iteration")):
        return "no measure or iteration"
    if not isinstance(content.get("checkpoint_digest"), str):
        return "no digest of its checkpoint"
    if not isinstance(scores, list) or len(scores) < 2 or not all(map(is_number, scores)):
        return "no list of scores"
    if not is_count(listed.get("tasks")) or listed["tasks"] != len(scores):
        return f"{len(scores)} scores of {listed.get('tasks')} tasks"
    for key, true in zip(("mean", "interval"), _mean_interval(scores), strict=True):
        stated = content.get(key)
        if not is_number(stated) or not math.isclose(stated, true, abs_tol=1e-9):
            return "its mean and interval are not those of its scores"
    return ""


def _mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and 1.96 * std / sqrt(n), as `kfo_ext.trainer.mean_interval`, which needs torch."""
    values = [float(score) for score in scores]
    mean = math.fsum(values) / len(values)
    return mean, 1.96 * statistics.stdev(values, mean) / math.sqrt(len(values))
