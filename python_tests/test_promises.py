"""CONTRIBUTING's table of promises: every promise has a row, and every test that a row names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
COUNT = 25


def rows() -> list[list[str]]:
    """The cells of each row: number, promise, tests, what is left open."""
    text = (TESTS.parent / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## Promises$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    lines = [line for line in section.splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[tuple[str, str]]:
    """(file, function) of each test of a cell, which holds nothing else."""
    found = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
    assert ", ".join(f"`{file}::{function}`" for file, function in found) == cell
    return found


@functools.cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_promise_has_one_row():
    assert [int(number) for number, *_ in rows()] == list(range(1, COUNT + 1))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_test_named_is_there(row):
    _, promise, tests, left_open = row
    assert promise
    assert tests or left_open, "a promise without a test says what is missing"
    for file, function in names(tests):
        assert function in functions_of(file), f"{file} has no test {function}"
        assert function.startswith("test_")
