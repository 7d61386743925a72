"""The provenance of every number (machine, versions, commit and command), and the files that hold both."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kfo_ext.machine import environment as run_environment
from kfo_ext.runs.files import atomic_write

Facts = dict[str, Any]
# The measurements of one thing.
Row = dict[str, Any]
DIRTY = "-dirty"


def environment() -> Facts:
    """The machine, versions, git commit and command line of this run."""
    return run_environment() | {
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{package: _version(package) for package in ("learn2learn", "triton", "jax", "torchopt", "higher")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(facts: Mapping[str, Any]) -> str:
    """The commit of a result as in a table: `commit 0123456789ab`, and whether there were uncommitted changes."""
    commit = facts["commit"]
    if commit is None:
        return "of no known commit"
    return f"commit {commit[:12]}{' with uncommitted changes' if commit.endswith(DIRTY) else ''}"


def warn_unless_committed(facts: Mapping[str, Any]) -> None:
    """Print one line on stderr if no commit identifies what is measured."""
    if facts["commit"] is None or facts["commit"].endswith(DIRTY):
        sys.stderr.write(f"WARNING: THESE NUMBERS ARE OF CODE THAT NO COMMIT HOLDS: {provenance(facts)}\n")


def facts_of(options: argparse.Namespace) -> Facts:
    """The facts of a script before it measures: `environment` and its settings, except where files lie."""
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "truths")}
    facts = environment() | {"settings": settings}
    warn_unless_committed(facts)
    return facts


def write_result(out: Path, result: Facts, markdown: Callable[[Facts], str] | None = None) -> None:
    """Write a result as JSON and then, beside it, as Markdown; each replaced atomically.

    Args:
        out: the JSON file.
        result: its content.
        markdown: makes the text of the result; None: only JSON.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, result)
    if markdown is not None:
        with atomic_write(out.with_suffix(".md")) as file:
            file.write(markdown(result).encode())


def write_rows(path: Path, content: Facts) -> None:
    """Write JSON in which each row is a line: a value of the whole, or an element of a list of lists or dicts.

    Args:
        path: the file to write or replace.
        content: the JSON object.

    Raises:
        ValueError: a number is not finite; the message names the file.
        OSError: the file cannot be written; the message names it.
    """
    try:
        text = _lines(content, "") + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with atomic_write(path) as file:
        file.write(text.encode())


def _lines(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and (not indent or any(map(_is_table, value.values()))):
        items = [f"{json.dumps(key)}: {_lines(item, deeper)}" for key, item in value.items()]
    elif _is_table(value):
        items = [_lines(item, deeper) for item in value]
    else:
        return json.dumps(value, allow_nan=False)
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}{right}"


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value)


def finite(value: float) -> float | None:
    """The value as JSON can hold it: None if it is not finite."""
    return value if math.isfinite(value) else None
