"""bench/cpu_pieces.py: it compiles, knows the work of what it times, and says what it is asked wrongly."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bench import cpu_pieces
from kfo_ext import _plan
from kfo_ext.ops import library

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built"),
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++").split()[0]), reason="no C++ compiler"),
]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The pieces, compiled without the optimizer, which takes its time."""
    monkeypatch.setattr(cpu_pieces.build, "HOST", cpu_pieces.build.HOST.replace("-O3", "-O0"))
    return cpu_pieces.compiled("baseline", ROOT / "csrc", tmp_path / "pieces.so")


ORDERS = {"forward": 1, "backward": 2, "double backward": 3}


def test_work_rows_and_table(library, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_pieces, "SAMPLE", 1e-5)
    monkeypatch.setattr(cpu_pieces, "compiled", lambda *_: library)
    out = tmp_path / "pieces.json"
    cases = ["--problems", "20,4,9", "1,3,1", "1,20,2", "--layers", "2,6,3,4,2", "2,5,3,4,2"]
    assert cpu_pieces.main([*cases, "--isa", "baseline", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [case["case"] for case in result["cases"]] == [
        [20, 4, 9],
        [1, 3, 1],
        [1, 20, 2],
        [2, 6, 3, 4, 2],
        [2, 5, 3, 4, 2],
    ]
    for case in result["cases"]:
        rows = {row["piece"]: row for row in case["pieces"]}
        flops = {name: 1e3 * row["gflop_per_s"] * row["microseconds"] for name, row in rows.items()}
        assert all(row["microseconds"] > 0 for row in rows.values())
        assert rows[cpu_pieces.PEAK]["share_of_peak"] == pytest.approx(1)
        if len(case["case"]) == 3:
            for name, order in ORDERS.items():
                assert flops[name] == pytest.approx(_plan.flops(case["case"], 1, order))
            # The pieces are of one block: left and right are all of the forward's work there.
            block = [name for name in rows if name.startswith(("left, ", "right, ")) and "R^T" not in name]
            matrices = next(name for name in rows if name.startswith("load, ")).split()[1]
            share = (1 if matrices == "a" else int(matrices)) / case["case"][0]
            assert sum(flops[name] for name in block) == pytest.approx(share * flops["forward"])
        else:
            # Along one axis: inputs meet the middle tap, or both others, in turn.
            met = {6: 1 + 2 + 1 + 2 + 1 + 2, 5: 1 + 2 + 1 + 2 + 1}[case["case"][1]]
            for name, along in (("conv2d", 9), ("conv2d_input", met), ("conv2d_weight", 9)):
                assert flops[name] == pytest.approx(2 * 2 * along * along * 4 * 3)
    text = out.with_suffix(".md").read_text()
    assert "## Transform, (B, p, q) = (20, 4, 9)" in text
    assert "| load, a matrix (transposed) |" in text
    assert "## Convolution, 2 images of 6 x 6 x 3, 4 channels out, stride 2" in text


def test_two_commits_in_turn(library):
    """The same library for both: a time is compared with that of its name."""
    rows = list(cpu_pieces.measure((4, 3, 5), [library, library], 2))
    assert all(row["of_the_other"] > 0 for row in rows)
    result = {
        "settings": {"against": "0123456789abcdef", "isa": "baseline", "rounds": 2},
        "command": "x",
        "processor": "y",
    }
    text = cpu_pieces.markdown(result | {"commit": "0" * 40, "cases": [{"name": "z", "pieces": rows}]})
    head, rule, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert head.endswith("| share of the peak | of the other |")
    assert {line.count("|") for line in (head, rule, *lines)} == {6}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_csrc_of_a_commit(tmp_path, capsys):
    name = cpu_pieces.full_name("HEAD")
    assert len(name) == 40
    assert (cpu_pieces.csrc_of(name, tmp_path) / "plan.h").is_file()
    with pytest.raises(SystemExit):
        cpu_pieces.main(["--against", "no such commit"])
    assert "expected a commit of this repository, got 'no such commit'" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["3,4", "3,4,x", "3,4,0", "3,-4,5", ""])
def test_a_problem_is_three_positive_integers(argument, capsys):
    with pytest.raises(SystemExit):
        cpu_pieces.main(["--problems", argument])
    assert "expected B,p,q, 3 positive integers, got" in capsys.readouterr().err
