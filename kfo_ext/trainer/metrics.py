"""metrics.jsonl: one JSON object per meta-iteration, and one per validation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .files import atomic_write

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Read the records in order; a last line that a killed process left unfinished is ignored.

    Raises: ValueError naming the file and the line that is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("iteration"), int) and line.endswith("\n"):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} is not a record of metrics")
    return records


def is_validation(record: Record) -> bool:
    """Whether a record is of a validation, not of a meta-iteration."""
    return "validation_loss" in record


class Metrics:
    """Appends records to a file, after dropping those that lie behind the checkpoint one resumes from.

    path: the file, made if absent.
    iteration, validated: the last training and the last validation iteration to keep.
    """

    def __init__(self, path: Path, iteration: int, validated: int) -> None:
        records = read_metrics(path)
        kept = [r for r in records if r["iteration"] <= (validated if is_validation(r) else iteration)]
        with atomic_write(path) as file:
            file.writelines(_line(record).encode() for record in kept)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by __exit__

    def append(self, record: Record) -> None:
        """Write one line, at once."""
        self._file.write(_line(record))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _line(record: Record) -> str:
    # JSON has no NaN: a measure that is not a number is null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"
