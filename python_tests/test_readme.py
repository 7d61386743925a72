"""The README's Python examples run as they stand."""

from __future__ import annotations

import pytest
from pages import ROOT, examples, run_example

README = ROOT / "README.md"


def test_there_are_examples():
    assert len(examples(README)) >= 2


@pytest.mark.parametrize("number", range(len(examples(README))))
def test_example_runs(number):
    run_example(README, number)
