"""bench/one_call.py, which a profiler watches, on the CPU: it makes the one call that it names."""

from __future__ import annotations

import json

import pytest

from bench import one_call
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the script: arguments to what it prints, and the orders that it called."""
    kfo_packed = one_call.kfo_packed

    def run(*arguments: str) -> tuple[str, list[str]]:
        called = []

        def watched(case):
            orders = kfo_packed(case)
            return {order: lambda order=order: called.append(order) or orders[order]() for order in orders}

        monkeypatch.setattr(one_call, "kfo_packed", watched)
        assert one_call.main(["--device", "cpu", *arguments]) == 0
        return capsys.readouterr().out, called

    return run


def test_the_options_decide(call):
    assert call("--tasks", "2") == ("CNN(4), 2 tasks, double_backward\n", ["double_backward"])
    assert call("--group", "CNN(2)", "--order", "forward", "--tasks", "1") == (
        "CNN(2), 1 tasks, forward\n",
        ["forward"],
    )


def test_the_worst_of_a_file_decides(call, tmp_path):
    file = tmp_path / "gpu_bench.json"
    options = ("--worst-of", str(file), "--tasks", "2")
    expected = ("CNN(4), 2 tasks, double_backward\n", ["double_backward"])
    assert call(*options) == expected
    file.write_text(json.dumps({"worst": None}))
    assert call(*options) == expected
    file.write_text(json.dumps({"worst": {"group": "CNN(2)", "order": "backward", "tasks": 3}}))
    assert call(*options) == ("CNN(2), 3 tasks, backward\n", ["backward"])
