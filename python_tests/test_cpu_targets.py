"""bench/cpu_targets.py: which lines hold, and the process of another instruction set."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kfo_ext.transform import native

BENCH = Path(__file__).resolve().parent.parent / "bench"

pytestmark = [
    pytest.mark.skipif(not BENCH.is_dir(), reason="bench/ is not beside the tests"),
    pytest.mark.skipif(not native.status()["cpu"][0], reason="the compiled CPU library is not built"),
]


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("cpu_targets")


def rows_of(order: str, **seconds: float) -> list[dict[str, object]]:
    names = {name.replace("_", "-"): value for name, value in seconds.items()}
    names |= {"packing alone": 1e-4, "native, largest parameters alone": 1e-5, "native, other parameters alone": 5e-6}
    return [
        {"group": "CNN(2)", "order": order, "contender": name, "flops": 1e6, "seconds": {"median": value}}
        for name, value in names.items()
    ]


def test_ratios_of_an_order(targets):
    rows = rows_of("forward", native=2e-5, lists=1e-4, torch_matmul=1.5e-4, torch_einsum=1.8e-4, learn2learn=2.1e-3)
    lines = list(targets.transform_lines("CNN(2)", "forward", rows, 1e11))
    assert [(line.measured, line.holds) for line in lines] == [
        ("21.0x", True),
        ("7.5x of torch-matmul", False),
        ("0.50", True),
    ]
    assert "15.0x at the FMA peak" in lines[1].bound


def test_host_times(targets):
    seconds = {"forward": 11e-6, "backward": 19e-6, "double_backward": 22e-6, targets.EMPTY: 6e-6}
    rows = [{"order": name, "seconds": {"median": value}} for name, value in seconds.items()]
    assert [line.holds for line in targets.host_lines(rows)] == [True, False, True]


def test_meta_iterations(targets):
    facts = {"network": "n", "method": "kfo", "tasks": 16}
    rows = [
        facts | {"contender": "ours_native", "over_ours": 1.0, "memory": {"working": 160}},
        facts | {"contender": "learn2learn", "over_ours": 2.9, "memory": {"working": 20}},
        facts | {"contender": "jax", "over_ours": 1.1},
        facts | {"contender": "jax_patches", "over_ours": None},
        facts | {"contender": "learn2learn", "over_ours": 9.0, "method": "maml"},
        facts | {"contender": "ours_native", "over_ours": 1.0, "network": "m", "memory": "TimeoutError: too long"},
        facts | {"contender": "learn2learn", "over_ours": 3.5, "network": "m", "memory": {"working": 20}},
    ]
    assert [(line.measured, line.holds) for line in targets.meta_lines(rows)] == [
        ("2.9x", False),
        ("0.50", True),
        ("1.1x", True),
        ("3.5x", True),
    ]


@pytest.mark.parametrize("isa", native.supported_isas()[1:])
def test_another_instruction_set(targets, isa):
    other = targets.OtherIsa(isa, "CNN(2)")
    try:
        assert 0 < targets.sample(targets.Remote(other, "forward"), 2) < 10
    finally:
        other.close()


def test_lists_without_the_transform_are_differentiable(targets):
    orders = targets.packing(targets.case_of("CNN(2)"))
    assert [len(orders[order]()) for order in targets.ORDERS] == [10, 30, 40]
