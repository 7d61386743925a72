"""bench/gpu_bench.py and bench/sanitize_case.py on the CPU: they run, and a wrong number is never timed or passed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from kfo_ext.ops import library
from kfo_ext.testing import LARGE_CASES, model_case

BENCH = Path(__file__).resolve().parent.parent / "bench"

pytestmark = [
    pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built"),
    pytest.mark.skipif(not BENCH.is_dir(), reason="bench/ is not beside the tests"),
]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_quick_run_writes_every_order(script, tmp_path, capsys):
    bench = script("gpu_bench")
    out = tmp_path / "bench.json"
    assert bench.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["floor"]["bandwidth"] > 0
    assert result["settings"]["budget"] is None and {"commit", "command", "torch"} <= set(result)
    rows = {(row["order"], row["provider"]): row for row in result["rows"]}
    for order in ("forward", "backward", "double_backward"):
        for provider in ("kfo native packed", "kfo gradients on", "kfo lists", "torch matmul", "torch formulas"):
            row = rows[order, provider]
            assert row["status"] == "ok" and row["mode"] == "eager"
            assert row["error"] < 1e-4
            assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
            assert row["gb_per_s"] > 0
            assert row["saved"] == (order != "forward" and provider in ("kfo lists", "torch matmul"))
            assert ("gflop_per_s" in row) == ("times_floor" in row) == (not row["saved"])
            assert row["best_peer_over_this"] > 0
    ours = [row for row in result["rows"] if row["provider"] == "kfo native packed"]
    assert result["worst"]["times_floor"] == max(row["times_floor"] for row in ours)
    text = capsys.readouterr().out
    assert text.count("| kfo native packed |") == 3


def test_a_wrong_or_absent_provider_gets_a_row_and_no_number(script, monkeypatch):
    bench = script("gpu_bench")
    right = bench.CONTENDERS["kfo native packed"]

    def wrong(case):
        orders = right.make(case)
        return {**orders, "backward": lambda: [2 * X for X in orders["backward"]()]}

    def absent(case):
        raise ImportError("not here\nand a long recipe")

    monkeypatch.setitem(bench.CONTENDERS, "kfo native packed", right._replace(make=wrong))
    monkeypatch.setitem(bench.CONTENDERS, "learn2learn", right._replace(make=absent))
    options = ["--device", "cpu", "--quick", "--providers", "kfo native packed", "learn2learn"]
    rows = bench.run(bench.parse(options))
    status = {(row["order"], row["provider"]): row for row in rows}
    assert status["forward", "kfo native packed"]["status"] == "ok"
    assert status["backward", "kfo native packed"]["status"].startswith("WRONG: relative error 1.0e+00")
    assert status["forward", "learn2learn"]["status"] == "does not run: ImportError: not here"
    assert all("seconds" in row for row in rows if row["status"] == "ok")
    assert not any("seconds" in row for row in rows if row["status"] != "ok")
    assert bench.main(options) == 1


def test_groups_are_those_of_the_tests(script):
    groups = {name: list(problems.shapes) for name, problems in script("gpu_bench").GROUPS.items()}
    cases = {f"CNN({layers})": model_case(layers) for layers in (2, 4)}
    assert groups == cases | {name: LARGE_CASES[name] for name in ("conv_64", "head_5x1600")}


def test_sanitize_case_fails_on_a_wrong_number(script, monkeypatch, capsys):
    sanitize = script("sanitize_case")
    assert sanitize.main(["--device", "cpu"]) == 0
    right = sanitize.run_order
    monkeypatch.setattr(sanitize, "run_order", lambda *arguments: [X + 1e-3 for X in right(*arguments)])
    assert sanitize.main(["--device", "cpu"]) == 1
    assert "Y of forward is off by" in capsys.readouterr().out
