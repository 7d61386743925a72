"""The README's Python examples and command lines run as they stand."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, examples, run_example

README = ROOT / "README.md"


def test_there_are_examples():
    assert len(examples(README)) >= 2


@pytest.mark.parametrize("number", range(len(examples(README))))
def test_example_runs(number):
    run_example(README, number)


def test_every_block_is_an_example_or_command_lines():
    assert set(re.findall(r"^```(.+)$", README.read_text(), flags=re.MULTILINE)) == {"python"}


def test_the_command_lines_run(kfo):
    lines = re.findall(r"^    kfo (\w+.*?)(?: +#.*)?$", README.read_text(), flags=re.MULTILINE)
    assert lines == ["doctor"]
    for line in lines:
        code, _, complaint = kfo(*line.split())
        assert code == 0, f"{line}: {complaint}"


def test_it_is_read_in_a_minute():
    assert len(README.read_text().split()) <= 600
