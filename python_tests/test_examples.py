"""Every script of experiments/examples runs as it stands, with few iterations, and is short enough to be read."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "experiments" / "examples").glob("*.py"))
# What each needs beside torch.
NEEDS = {
    "adapt_and_save": None,
    "gbml": None,
    "hand_written_loop": None,
    "higher_loop": "higher",
    "hypergradient": None,
    "own_data": None,
    "own_network": None,
    "regression": None,
    "torch_func_loop": None,
    "torchopt_loop": "torchopt",
}


def test_all_of_them_are_here_and_in_the_documentation():
    assert {path.stem for path in EXAMPLES} == set(NEEDS)
    page = (ROOT / "docs" / "start" / "examples.md").read_text()
    linked = set(re.findall(r"\]\(\.\./\.\./experiments/examples/(\S+?)\)", page))
    assert linked == {path.name for path in EXAMPLES[0].parent.iterdir() if path.suffix in (".py", ".ipynb")}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    """In a process of its own, in another folder, where a warning is an error."""
    assert len(path.read_text().splitlines()) < 80
    needed = NEEDS.get(path.stem)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install --no-deps {needed}")
    done = subprocess.run(
        [sys.executable, "-W", "error", path, "2"], capture_output=True, text=True, cwd=tmp_path, timeout=seconds(120)
    )
    assert done.returncode == 0, done.stderr
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?|nan|inf", done.stdout)]
    assert numbers
    # Not NaN, and no loss beyond all bounds.
    assert all(abs(number) < 1e3 for number in numbers), done.stdout
    assert not list(tmp_path.iterdir())
