"""bench/cpu_targets.py: which lines hold over several runs, and the processes that measure."""

from __future__ import annotations

import json

import pytest
import torch

from bench import cpu_target_lines as lines
from bench import cpu_target_run as run
from bench import cpu_targets
from kfo_ext.bench import roofs
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


def timed(median: float) -> dict[str, float]:
    return {"median": median, "low": median, "high": median, "repeats": 1, "calls_per_repeat": 1}


def rows_of(group: str = "CNN(2)", order: str = "forward", saved: tuple[str, ...] = (), **seconds: float):
    """Rows of one process; `_` in a name stands for `-`, and for the rest of ours there is something."""
    names = {name.replace("_", "-"): value for name, value in seconds.items()}
    names |= {run.PACKING: 1e-4, run.LARGE: 1e-5, run.SMALL: 5e-6}
    names |= {run.on(isa): names.pop(isa) for isa in ("avx2", "baseline") if isa in names}
    where = {"group": group, "order": order, "flops": 1e6}
    return [
        where | {"contender": name, "saved": name in saved, "seconds": timed(value)} for name, value in names.items()
    ]


def lines_of(*runs, other=()):
    over = cpu_targets.over_runs
    return list(lines.transform_lines("CNN(2)", "forward", over(runs), over(other), [1e11] * len(runs), "avx512"))


def test_ratios_of_an_order():
    seconds = {"lists": 1.5e-4, "torch_matmul": 1.5e-4, "torch_einsum": 1.8e-4, "learn2learn": 2.1e-3}
    seconds["gradient_lists"] = 1e-4
    rows = rows_of(native=2e-5, avx2=4e-5, baseline=1e-4, saved=("torch-matmul",), **seconds)
    found = lines_of(rows)
    assert [(line.measured, line.holds) for line in found] == [
        ("21.0x", True),
        ("14.0x", False),
        ("7.5x of torch-matmul", False),
        ("0.50", True),
        ("0.50", True),
        ("0.20", None),
    ]
    assert found[2].bound == "15.0x at the FMA peak; that one reads products that the order before saved"
    assert "| 0.20 |  |  |  |" in found[5].text() and "**no**" in found[2].text()


def test_the_floor_is_that_of_the_same_rounds():
    rows = rows_of(native=2e-5, torch_matmul=1e-4, lists=1.0, gradient_lists=1.0)
    busy = {**rows[0], "contender": run.FMA, "flops": 3e6, "seconds": timed(6e-5)}
    share = {line.target: line.measured for line in lines_of([*rows, busy])}
    assert share["share of the FMA floor: 0.5"] == "1.00"


def test_multiply_adds_count_their_operations(monkeypatch):
    monkeypatch.setattr(roofs, "FMA_STEPS", 1 << 8)
    call, operations = roofs.multiply_adds(2)
    assert call() == operations == 2 * library.cpu_multiply_adds(1 << 8)


def test_the_median_over_the_runs_decides():
    def of(native, torch_matmul):
        return rows_of(native=native, lists=1e-4, gradient_lists=1e-4, torch_matmul=torch_matmul, learn2learn=2.1e-3)

    found = lines_of(of(2e-5, 1.2e-4), of(2e-5, 1.8e-4), of(1e-5, 0.82e-4))
    assert (found[2].measured, found[2].holds) == ("8.2x (6.0..9.0) of torch-matmul", True)
    found = lines_of(of(2e-5, 1.2e-4), of(2e-5, 1.8e-4), of(1e-5, 0.78e-4))
    assert (found[2].measured, found[2].holds) == ("7.8x (6.0..9.0) of torch-matmul", False)
    assert found[3].measured == "0.50 (0.50..1.00)"


def test_without_kept_memory_stands_beside_it():
    kept = rows_of(native=2e-5, lists=1e-4, gradient_lists=5e-5, torch_matmul=1.8e-4, learn2learn=2.1e-3)
    other = rows_of(
        native=2e-5, lists=2e-4, gradient_lists=1e-4, torch_matmul=3e-4, torch_einsum=2e-4, learn2learn=3e-3
    )
    found = lines_of(kept, other=[other])
    assert [line.as_glibc_comes for line in found] == ["30.0x", "15.0x", "10.0x of torch-einsum", ""]


def test_rows_over_runs():
    over, in_order = cpu_targets.over_runs, cpu_targets.in_order
    first, second = rows_of(native=1.0, jax=5.0), rows_of(jax=6.0, native=3.0)
    del second[0]["seconds"]
    second[0]["why_not"] = "failed"
    rows = {row["contender"]: row for row in over([in_order(first), in_order(second)])}
    assert rows["native"]["seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert rows["native"]["runs"] == [1.0, 3.0]
    assert rows["jax"]["why_not"] == "failed" and "seconds" not in rows["jax"]


def test_host_times():
    seconds = {"forward": (11e-6, 14e-6, 9e-6), "backward": (19e-6,) * 3, "double_backward": (22e-6,) * 3}
    seconds |= {run.EMPTY: (6e-6,) * 3}
    rows = [{"order": name, "runs": list(values)} for name, values in seconds.items()]
    found = list(lines.host_lines(rows))
    assert [line.holds for line in found] == [True, False, True]
    assert found[0].measured == "11.0 us (9.0..14.0)"


def test_meta_iterations():
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
    assert [(line.measured, line.holds) for line in lines.meta_lines(rows)] == [
        ("2.9x", False),
        ("0.50", True),
        ("1.1x", True),
        ("3.5x", True),
    ]


def test_files_of_several_processes(monkeypatch, tmp_path, capsys):
    targets, asked = cpu_targets, []
    seconds = {"lists": 1e-4, "gradient_lists": 1e-4, "torch_matmul": 1.5e-4, "learn2learn": 2.1e-3}

    def fake(repeats, *more):
        asked.append((repeats, *more))
        rows = [
            row
            for group in run.NETWORKS
            for order in ("forward", "backward", "double_backward")
            for row in rows_of(group, order, native=1e-5 * len(asked), **seconds)
        ]
        host = [
            {"order": name, "seconds": timed(1e-5)} for name in ("forward", "backward", "double_backward", run.EMPTY)
        ]
        return {"keeps_freed_memory": not more, "fma_gflop_per_s": 100.0, "rows": rows, "host": [] if more else host}

    monkeypatch.setattr(targets, "run", fake)
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps({"settings": {"tasks": 2, "repeats": 5}, "rows": [], "command": "c", "commit": None}))
    out = tmp_path / "new" / "targets.json"
    assert targets.main(["--runs", "2", "--repeats", "4", "--meta", str(peers), "--out", str(out)]) == 0
    assert asked == [(4,), (4, "--as-glibc-comes")] * 2
    result = json.loads(out.read_text())
    rows = {(row["group"], row["order"], row["contender"]): row["seconds"] for row in result["rows"]}
    assert rows["CNN(4)", "forward", "native"] == pytest.approx({"median": 2e-5, "low": 1e-5, "high": 3e-5})
    assert result["settings"]["runs"] == 2 and result["keeps_freed_memory"] == [True, True]
    text = out.with_suffix(".md").read_text()
    assert text.count("10.0x (5.0..15.0) of torch-matmul") == 6 and "`python bench/c`, of no known commit" in text
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("isa", library.supported_isas()[1:])
def test_another_instruction_set(isa):
    other = run.OtherIsa(isa, "CNN(2)")
    try:
        assert 0 < run.awake(run.Remote(other, "forward"), 2) < 10
    finally:
        other.close()


def test_lists_without_the_transform_are_differentiable():
    orders = run.packing(run.case_of("CNN(2)"))
    assert [len(orders[order]()) for order in run.ORDERS] == [10, 30, 40]


def test_what_hands_on_computes_nothing():
    R, G, L = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    dY, ddR, ddG, ddL = (torch.randn(2, 3) for _ in range(4))
    dY.requires_grad_()
    first = torch.autograd.grad(run.HandedOn.apply(R, G, L), (R, G, L), dY, create_graph=True)
    second = torch.autograd.grad(first, (R, G, L, dY), (ddR, ddG, ddL))
    for X, same in zip((*first, *second), (R, G, L, ddR, ddG, ddL, ddG), strict=True):
        assert X.data_ptr() == same.data_ptr()
