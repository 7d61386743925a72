"""The README's Python examples run as they stand, and its command lines with few iterations."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, examples, run_example, small

README = ROOT / "README.md"


def test_there_are_examples():
    assert len(examples(README)) >= 2


@pytest.mark.parametrize("number", range(len(examples(README))))
def test_example_runs(number):
    run_example(README, number)


def test_every_block_is_an_example_or_command_lines():
    assert set(re.findall(r"^```(.+)$", README.read_text(), flags=re.MULTILINE)) == {"python"}


def test_the_command_lines_run(kfo):
    """One after the other; tasks of the synthetic characters stand for those of data that is not here."""
    lines = re.findall(r"^    kfo (\w+.*?)(?: +#.*)?$", README.read_text(), flags=re.MULTILINE)
    # test_bench.py runs `kfo bench`.
    lines = [line for line in lines if not line.startswith("bench")]
    assert {line.split()[0] for line in lines} == {"train", "eval", "compare", "export", "doctor"}
    for line in lines:
        code, _, complaint = kfo(*small(line.replace("omniglot --data-root DATA/omniglot", "glyphs")))
        assert code == 0, f"{line}: {complaint}"
