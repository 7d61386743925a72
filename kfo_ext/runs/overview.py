"""Summaries of the runs below a folder, for `kfo runs`. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .files import read_json
from .metrics import is_validation, read_metrics
from .run_folder import RunFolder
from .scores import fault

HEAD = ("run", "data", "method", "update", "iterations", "validation", "test")
Cells = dict[str, str]
# The only keys of config.json that are read here; code that uses a run checks all of it.
_SHOWN = ("dataset", "method", "update")


class Summary(NamedTuple):
    """One run.

    Attributes:
        cells: texts for HEAD.
        faults: which of its files cannot be read, and why.
    """

    cells: tuple[str, ...]
    faults: tuple[str, ...]


def found_runs(folder: Path) -> list[Path]:
    """Find the run folders at and below a folder.

    Args:
        folder: where to search.

    Returns:
        Their paths, sorted by name.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    return sorted(_below(folder))


def _below(folder: Path) -> Iterator[Path]:
    for path, below, files in os.walk(folder):
        # An export has a config.json too.
        if "config.json" in files and "model.safetensors" not in files:
            # Runs are not nested.
            below.clear()
            yield Path(path)


def summary(path: Path) -> Summary:
    """Summarize one run folder: the best validation, and the score of the best checkpoint on test tasks."""
    run = RunFolder(path)
    parts = [_readable(part, run) for part in (_configured, _progress, _tested)]
    cells = dict.fromkeys(HEAD, "") | {"run": str(path)}
    for found, _ in parts:
        cells |= found
    return Summary(tuple(cells[name] for name in HEAD), tuple(fault for _, fault in parts if fault))


def _readable(part: Callable[[RunFolder], Cells], run: RunFolder) -> tuple[Cells, str]:
    """The cells, or the reason why their file cannot be read."""
    try:
        return part(run), ""
    except (OSError, ValueError) as error:
        return {}, str(error)


def table(summaries: list[Summary]) -> list[str]:
    """The lines of a table; each column is as wide as its longest cell."""
    rows = [HEAD, *(each.cells for each in summaries)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def trained(run: RunFolder) -> int | None:
    """Count the meta-iterations that a run has recorded.

    Args:
        run: the run folder.

    Returns:
        The number of the last one; None without records.

    Raises:
        ValueError: the file of records cannot be read; the message names it.
    """
    return max((record["iteration"] for record in read_metrics(run.metrics) if not is_validation(record)), default=None)


def _config(run: RunFolder) -> dict[str, Any]:
    config = read_json(run.config)
    if not isinstance(config, dict):
        raise ValueError(f"{run.config}: expected an object of configuration values, got {type(config).__name__}")
    return config


def _configured(run: RunFolder) -> Cells:
    config = _config(run)
    return {("data" if name == "dataset" else name): str(config.get(name, "")) for name in _SHOWN}


def _progress(run: RunFolder) -> Cells:
    cells = {"iterations": f"{trained(run) or 0} of {_config(run).get('iterations')}"}
    validations = [record for record in read_metrics(run.metrics) if is_validation(record)]
    for measure, best in (("accuracy", max), ("loss", min)):
        scored = [record for record in validations if record.get(f"validation_{measure}") is not None]
        if scored:
            record = best(scored, key=lambda each: each[f"validation_{measure}"])
            score = f"{measure} {record[f'validation_{measure}']:.4f}"
            return cells | {"validation": f"{score} at {record['iteration']}"}
    return cells


def _tested(run: RunFolder) -> Cells:
    path = run.evaluation("test", "best")
    if not path.exists():
        return {"test": "not evaluated"}
    content = read_json(path)
    if reason := fault(content, "test", "best"):
        raise ValueError(f"{path}: not an evaluation written by kfo ({reason}); evaluate the run again")
    older = "" if _is_of(run.best, content["checkpoint_digest"]) else ", of an older checkpoint"
    tasks = content["task_list"]["tasks"]
    return {"test": f"{content['measure']} {content['mean']:.4f} ± {content['interval']:.4f} ({tasks} tasks{older})"}


def _is_of(checkpoint: Path, digest: str) -> bool:
    """Whether a digest matches the first line of a checkpoint, or there is no checkpoint."""
    if not checkpoint.exists():
        return True
    with open(checkpoint, "rb") as file:
        return digest.encode() in file.readline(256)
