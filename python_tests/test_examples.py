"""Every script of experiments/examples runs as it stands, with few iterations, and is short enough to be read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "experiments" / "examples").glob("*.py"))
NAMES = {"adapt_and_save", "hand_written_loop", "hypergradient", "own_data", "own_network", "regression"}


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= NAMES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    """In a process of its own, in another folder, where a warning is an error."""
    assert len(path.read_text().splitlines()) < 80
    done = subprocess.run(
        [sys.executable, "-W", "error", path, "2"], capture_output=True, text=True, cwd=tmp_path, timeout=seconds(120)
    )
    assert done.returncode == 0, done.stderr
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?|nan|inf", done.stdout)]
    assert numbers
    # Not NaN, and no loss beyond all bounds.
    assert all(abs(number) < 1e3 for number in numbers), done.stdout
    assert not list(tmp_path.iterdir())
