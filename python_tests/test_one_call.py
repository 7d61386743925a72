"""bench/one_call.py, which a profiler watches, on the CPU: it makes the one call that it names."""

from __future__ import annotations

import pytest

from bench import one_call
from kfo_ext.bench import report
from kfo_ext.bench.rows import empty_row
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")

# Axis, tasks and share of the floor: the worst of the axis tasks has three.
ROWS = (("tasks", 4, 0.9), ("tasks", 3, 0.2), ("width", 4, 0.1))


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


def test_other_operators_may_be_called_too(call, monkeypatch):
    printed, _ = call("--tasks", "1", "--operators", "batch_norm", "conv2d")
    others = ["batch_norm, 1 tasks, double_backward", "conv2d, 1 tasks, double_backward"]
    assert printed.splitlines()[1:] == others
    monkeypatch.setattr(one_call.OTHERS["conv2d"][1], "devices", ("cuda",))
    assert call("--tasks", "1", "--operators", "batch_norm", "conv2d")[0].splitlines()[1:] == others[:1]


def test_the_worst_of_a_file_decides(call, tmp_path):
    file = tmp_path / "results.json"
    options = ("--worst-of", str(file), "--tasks", "2")
    expected = ("CNN(4), 2 tasks, double_backward\n", ["double_backward"])
    assert call(*options) == expected
    where = {"group": "CNN(2)", "order": "backward", "mode": "eager", "provider": "native"}
    last = [empty_row(axis=axis, tasks=tasks, floor_share=share, **where) for axis, tasks, share in ROWS]
    for rows, said in (([], expected), (last, ("CNN(2), 3 tasks, backward\n", ["backward"]))):
        report.write(tmp_path, rows, {})
        assert call(*options) == said
