"""metrics.jsonl: one JSON object per meta-iteration, and one per validation."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .files import atomic_write, is_count, is_number, parse_json, unwritable
from .progress import Progress

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# A function that receives each record once it is in the file.
Logger = Callable[[Record], object]

_REMEDY = "mend the file, or move it away to go on without its records"


def read_metrics(path: Path) -> list[Record]:
    """Read the records in order; an unfinished last line, left by a killed process, is ignored.

    Args:
        path: metrics.jsonl.

    Returns:
        The records; none if the file is absent.

    Raises:
        ValueError: a line is not a record, or is out of order; the message names the file and the line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records: list[Record] = []
    reached = {True: 0, False: 0}
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is None or not line.endswith("\n"):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not a record of metrics; {_REMEDY}")
            break
        kind, iteration = is_validation(record), record["iteration"]
        if iteration <= reached[kind]:
            raise ValueError(f"{path}: line {number}: iteration {iteration} follows {reached[kind]}; {_REMEDY}")
        if _has_accuracy(record) != _has_accuracy(records[0] if records else record):
            raise ValueError(f"{path}: line {number}: accuracies are in some records, not in all; {_REMEDY}")
        reached[kind] = iteration
        records.append(record)
    return records


def is_validation(record: Record) -> bool:
    """Whether a record belongs to a validation, not to a meta-iteration."""
    return "validation_loss" in record


def lost_records(records: list[Record], progress: Progress, validation_every: int) -> str:
    """Describe the records that a run must have written but that are missing.

    Args:
        records: of metrics.jsonl.
        progress: of the last checkpoint.
        validation_every: of the run's configuration.

    Returns:
        The description; '' if no record is missing.
    """
    trained = set(range(1, progress.iteration + 1))
    validated = set(range(validation_every, progress.validated + 1, validation_every)) | {progress.validated} - {0}
    trained -= {record["iteration"] for record in records if not is_validation(record)}
    validated -= {record["iteration"] for record in records if is_validation(record)}
    parts = [
        f"{len(lost)} of {kind}, the first of iteration {min(lost)}"
        for kind, lost in (("meta-iterations", trained), ("validations", validated))
        if lost
    ]
    return " and ".join(parts)


class Metrics:
    """Appends records to a file, after dropping those later than the checkpoint that the run resumes from.

    Missing records do not end a run, since its checkpoints suffice: a warning names them, and the curve has a gap.

    Args:
        path: the file, created if absent.
        progress: of the checkpoint, whose records are kept.
        validation_every: of the run's configuration.
        loggers: each gets every record that is appended, after the file.

    Raises:
        ValueError: the file holds anything but records; the message names it.
        OSError: the file cannot be written; the message names it.
    """

    def __init__(self, path: Path, progress: Progress, validation_every: int, loggers: Iterable[Logger] = ()) -> None:
        self._path = path
        self._loggers = tuple(loggers)
        records = read_metrics(path)
        reached = {True: progress.validated, False: progress.iteration}
        kept = [record for record in records if record["iteration"] <= reached[is_validation(record)]]
        if lost := lost_records(kept, progress, validation_every):
            logger.warning("%s: lost records: %s; the run goes on without them", path, lost)
        with atomic_write(path) as file:
            file.writelines(_line(record) for record in kept)
        # Unbuffered: a line that does not fit on the disk is not written again when the file is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by __exit__

    def append(self, record: Record) -> None:
        """Write one line immediately."""
        line = _line(record)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise unwritable(self._path, error) from error
        for log in self._loggers:
            log(dict(record))

    def sync(self) -> None:
        """Flush the lines to the disk, before a checkpoint that relies on them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


class Unwritten(Metrics):
    """Accepts records and writes none: for ranks of a training that do not write."""

    def __init__(self) -> None:
        pass

    def append(self, record: Record) -> None:
        """Does nothing: the first rank writes."""

    def sync(self) -> None:
        """Does nothing: there is nothing to flush."""

    def __exit__(self, *exc: object) -> None:
        pass


def _parsed(line: str) -> Record | None:
    """The record in a line, or None."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_count(record.get("iteration"), 1):
        return None
    needed = {"validation_loss", "validation_loss_interval"} if is_validation(record) else {"loss"}
    if "validation_accuracy" in record:
        needed.add("validation_interval")
    numbers = all(value is None or is_number(value) for value in record.values())
    widths = [value for name, value in record.items() if name.endswith("interval")]
    return record if needed <= record.keys() and numbers and all(v is None or v >= 0 for v in widths) else None


def _has_accuracy(record: Record) -> bool:
    return ("validation_accuracy" if is_validation(record) else "accuracy") in record


def _line(record: Record) -> bytes:
    # JSON has no NaN: a measure that is not finite becomes null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return (json.dumps(plain, allow_nan=False) + "\n").encode()
