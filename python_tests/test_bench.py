"""`kfo bench`: what it computes from timings, what it writes, and that a wrong number is never timed."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import plot_results
from kfo_ext import testing
from kfo_ext.bench import command, cost, fits, memory, plots, points, providers, report, roofs, rows
from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.device_timing import Floor
from kfo_ext.bench.measure import Contender, affordable
from kfo_ext.bench.orders import LeftOut, error_of, truth
from kfo_ext.bench.points import Point
from kfo_ext.bench.timing import Timing
from kfo_ext.ops import library
from kfo_ext.problems import Problems

BENCH = Path(__file__).resolve().parent.parent / "bench"
SMALL = Problems.of([torch.empty(3, 2, 3, 3), torch.empty(3), torch.empty(4, 3), torch.empty(1, 5)])
UPDATES = {"plain": (False, 0), "psd": (True, 0), "hidden": (False, 2), "psd_hidden": (True, 1)}

needs_library = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


@pytest.mark.parametrize("size", [2.5, 1, 0, -0.7])
def test_exponent_of_a_power_law(size):
    curve = [(x, 3e-6 * x**size) for x in (1, 4, 16, 100)]
    assert fits.exponent(curve) == pytest.approx(size)


def test_exponent_is_the_least_squares_one():
    assert fits.exponent([(1, 1), (math.e, math.e), (math.e**2, math.e)]) == pytest.approx(0.5)
    for bad in ([(1, 1)], [(2, 1), (2, 3)], [(0, 1), (1, 1)], [(1, 1), (2, 0)]):
        with pytest.raises(ValueError, match="points: expected positive sizes"):
            fits.exponent(bad)


def test_cliffs_are_steps_of_more_than_three_per_doubling():
    assert fits.cliffs([(1, 1), (2, 2.9), (4, 8), (8, 25)]) == [(4, 8, 25 / 8)]
    assert fits.cliffs([(2, 1), (3, 1.8)]) == []
    assert fits.cliffs([(2, 1), (3, 2)]) == [(2, 3, 2.0)]


def test_upper_half():
    curve = [(x, 1.0) for x in (16, 1, 256, 4, 64)]
    assert [x for x, _ in fits.upper_half(curve)] == [16, 64, 256]
    assert [x for x, _ in fits.upper_half(curve[:2])] == [1, 16]
    assert [x for x, _ in fits.upper_half(curve[:3])] == [16, 256]


def measured(axis: str, x: int, seconds: float | None, group: str = "g", name: str = "native") -> rows.Row:
    status = "ok" if seconds else "left out: slow"
    return rows.empty_row(
        axis=axis, x=x, group=group, order="forward", provider=name, mode="eager", status=status, median_s=seconds
    )


def test_fits_of_rows():
    table = [measured("tasks", x, None if x == 256 else x**1.5) for x in (1, 4, 16, 64, 256)]
    table += [measured("layers", x, float(x), group=f"CNN({x})") for x in (2, 4, 6)]
    table += [measured("hidden", x, (x + 1.0) ** 2) for x in range(4)]
    table += [measured("psd", x, x + 1.0) for x in range(2)]
    table += [measured("width", 1, 1.0)]
    found = {fit["axis"]: fit for fit in fits.fits(table)}
    assert set(found) == {"tasks", "layers", "hidden"}
    assert [found["tasks"][key] for key in ("from", "to", "points")] == [16, 64, 2]
    assert found["tasks"]["exponent"] == pytest.approx(1.5)
    assert (found["layers"]["group"], found["layers"]["exponent"]) == ("CNN", pytest.approx(1))
    assert (found["hidden"]["from"], found["hidden"]["exponent"]) == (3, pytest.approx(2))


def test_floor_is_the_larger_bound():
    floor = Floor(10.0, {"eager": 3.0, "graph": 1.0})
    here = roofs.Roofs(5.0, "", floor, on_cuda=False)
    assert here.seconds("eager", 100.0, 10.0) == 20
    assert here.seconds("eager", 1.0, 10.0) == 1
    assert here._replace(flops=None).seconds("eager", 1.0, 10.0) is None
    there = here._replace(on_cuda=True)
    assert there.seconds("eager", 1e9, 10.0) == 3
    assert there.seconds("graph", 1e9, 20.0) == 2


@needs_library
def test_rate_of_multiply_adds():
    steps = 1000
    lanes = {"avx512": 16, "avx2": 8, "baseline": 4}[library.cpu_isa()]
    assert library.cpu_multiply_adds(steps) == steps * 12 * lanes * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_rate_is_that_of_the_fastest_sample(monkeypatch, threads):
    monkeypatch.setattr(roofs.library, "cpu_multiply_adds", lambda steps: 10.0 * steps)
    monkeypatch.setattr(
        roofs, "samples_of", lambda functions, *_: {name: ([4e-3, 3e-3, 5e-3], 1) for name in functions}
    )
    assert roofs.fma_rate(threads) == pytest.approx(threads * 10 * roofs.FMA_STEPS / 3e-3)


def test_importing_draws_nothing_from_the_users_generator():
    code = (
        "import torch; before = torch.get_rng_state(); import kfo_ext.bench.command; "
        "assert torch.equal(before, torch.get_rng_state())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(points.GROUPS["CNN(2)"].shapes) == testing.model_case(2)


@needs_library
def test_cost_of_a_row_of_transforms():
    plain = Point("tasks", 3, "g", SMALL, 3)
    one = {order: cost.flops(plain, order) for order in ORDERS}
    moved = {order: cost.bytes_moved(plain, order) for order in ORDERS}
    assert one["forward"] == 3 * sum(2 * B * (p * p * q + p * q * q) for B, p, q in SMALL.shapes)
    matrices, factors = SMALL.packing.numel, SMALL.R.numel + SMALL.L.numel
    assert moved["forward"] == 3 * 4 * (2 * matrices + factors)
    psd = plain._replace(psd=True)
    assert psd.transforms == 2
    assert [cost.flops(psd, order) for order in ORDERS] == [
        2 * one["forward"],
        2 * one["backward"],
        2 * one["double_backward"] + one["backward"],
    ]
    assert cost.bytes_moved(psd, "forward") == moved["forward"]
    deep = plain._replace(hidden=2)
    assert (deep.transforms, deep._replace(psd=True).transforms) == (3, 5)
    assert cost.bytes_moved(deep, "forward") == 3 * 4 * (2 * matrices + 3 * factors)


def test_truth_is_that_of_the_tests():
    case = random_case(SMALL, 3, torch.float64)
    right, found = testing.truth(case.operands, SMALL.shapes), truth(case)
    for order, names in {
        "forward": ["Y"],
        "backward": ["dR", "dL", "dG"],
        "double_backward": ["second_R", "second_L", "second_G", "second_dY"],
    }.items():
        for name, X in zip(names, found[order], strict=True):
            assert testing.relative_error(X, right[name]) < 1e-13, name


# Written for the plain transform, and left out elsewhere.
PLAIN_ALONE = ("torch-formulas", "gradient-lists", "gradients-on")


def works(name: str) -> bool:
    try:
        providers.PROVIDERS[name].check(torch.device("cpu"))
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("update", ["plain", "psd"])
@pytest.mark.parametrize("name", [name for name in providers.PROVIDERS if "compile" not in name])
def test_who_reads_what_was_saved(name, update):
    if not works(name):
        pytest.skip("not installed")
    case = random_case(SMALL, 3, torch.float32, psd=UPDATES[update][0])
    if name in PLAIN_ALONE and not case.plain:
        pytest.skip("written for the plain transform alone")
    provider = providers.PROVIDERS[name]
    orders, operands = provider.make(case), {X.data_ptr() for X in (*case.phi, case.G, case.dY, *case.ddphi, case.ddG)}
    saved = set()

    def pack(X):
        saved.add(X.untyped_storage().data_ptr())
        return X

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda X: X):
        orders["backward"](), orders["double_backward"]()
    assert (
        provider.reads_saved("backward", case)
        == provider.reads_saved("double_backward", case)
        == bool(saved - operands)
    )
    assert not provider.reads_saved("forward", case)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", [name for name in providers.PROVIDERS if "compile" not in name])
def test_every_provider_computes_the_same(name, update):
    if not works(name):
        pytest.skip("not installed")
    psd, hidden = UPDATES[update]
    case = random_case(SMALL, 3, torch.float64, psd=psd, hidden=hidden)
    assert (case.hidden, case.plain) == (hidden, update == "plain")
    provider, expected = providers.PROVIDERS[name], truth(case)
    if (name in PLAIN_ALONE and not case.plain) or (name == "learn2learn" and hidden):
        with pytest.raises(LeftOut):
            provider.make(case)
        return
    made = provider.make(case)
    for order in ORDERS:
        assert error_of(provider.pack, order, made[order](), case, expected) < 1e-12, order


def test_error_sees_every_output():
    case = random_case(SMALL, 2, torch.float64)
    expected = truth(case)
    for order in ORDERS:
        for i in range(len(expected[order])):
            off = [X.clone() for X in expected[order]]
            off[i][-1, -1] += off[i].abs().max()
            assert error_of(lambda order, outputs, case: outputs, order, off, case, expected) == pytest.approx(1)
            off[i][0, 0] = math.nan
            assert math.isnan(error_of(lambda order, outputs, case: outputs, order, off, case, expected))


def test_peak_memory_of_a_call():
    def call():
        first = torch.empty(1000)
        second = first + first
        del first
        return second * 2

    # Two at a time, of the three; what the call returns counts.
    assert memory.peak_extra_bytes(call, torch.device("cpu")) == pytest.approx(8000, abs=200)


def test_budget_leaves_out_what_is_too_slow(monkeypatch):
    spent = {"fast": 0.01, "slow": 0.5}
    monkeypatch.setattr("kfo_ext.bench.measure.finished", lambda call, calls: spent[call()])

    def affordable_of(*names, budget, repeats=15):
        good = [Contender(name, lambda name=name: name, 0.0) for name in names]
        kept, reasons, fitting = affordable(good, repeats, 0.004, budget)
        return [contender.name for contender in kept], reasons, fitting

    kept, reasons, fitting = affordable_of("fast", "slow", budget=1.0)
    assert (kept, fitting) == (["fast"], 15)
    assert reasons == {"slow": "left out: one call takes 0.5 s, too long for 1 s per order"}
    assert affordable_of("fast", "slow", budget=5.1)[2] == 7
    assert affordable_of("fast", "slow", budget=2.5)[2] == 3
    assert affordable_of("fast", budget=1.0, repeats=2)[2] == 2


def test_points_of_the_axes():
    for values in (points.VALUES, points.QUICK_VALUES):
        made = points.points_of(tuple(points.AXES), ("CNN(2)",), values)
        assert {point.axis for point in made} == set(points.AXES)
        assert len({point.label for point in made}) == len(made)
        assert [p.tasks for p in made if p.axis == "tasks"] == list(values["tasks"])
        assert [p.hidden for p in made if p.axis == "hidden"] == list(values["hidden"])
        assert [p.psd for p in made if p.axis == "psd"] == [False, True]
        assert [p.problems.shapes for p in made if p.axis == "width"] == [((1, x, x),) for x in values["width"]]
        # One measurement serves several axes.
        at = {point.label: point.same for point in made}
        assert at["layers=2 CNN(2)"] == at["tasks=16 CNN(2)"]
        assert at["hidden=0 CNN(2)"] == at["psd=0 CNN(2)"] != at["psd=1 CNN(2)"]


@pytest.fixture
def tiny(monkeypatch):
    """`kfo bench` on one small group; the options that choose it."""
    monkeypatch.setitem(points.GROUPS, "tiny", SMALL)
    for axis, values in {"tasks": (1, 2), "hidden": (0, 1), "width": (1, 3)}.items():
        monkeypatch.setitem(points.QUICK_VALUES, axis, values)
    return {"quick": True, "groups": ("tiny",), "repeats": 2, "seconds": 1e-4, "budget": 5.0}


def test_the_host_has_a_time_and_no_rate():
    floor = Floor(1e9, {"eager": 1e-6, "graph": 1e-6})
    point, timing = Point("tasks", 2, "tiny", SMALL, 2), Timing(3e-6, 2e-6, 4e-6, 5, 50)
    row = rows.empty_row(provider="native", ours=True, mode="host", order="forward", status="ok", error=1e-7)
    row |= rows._numbers(point, row, timing, roofs.Roofs(1e9, "", floor, True))
    assert row["median_s"] == 3e-6 and row["gb_per_s"] is row["floor_share"] is row["flops"] is None
    assert "3 us" in report.line(row)


def test_the_row_furthest_from_the_floor():
    def row(share, mode="eager", provider="native"):
        return rows.empty_row(provider=provider, mode=mode, floor_share=share)

    eager = [row(0.5), row(0.1), row(None), row(0.01, provider="lists")]
    assert report.worst(eager) is eager[1]
    replayed = [*eager, row(0.8, "graph"), row(0.9, "graph"), row(None, "host")]
    assert report.worst(replayed) is replayed[4]
    assert report.worst([row(None)]) is None


@pytest.mark.parametrize(("ratio", "lost"), [(None, False), (0.99, True), (1.0, False), (1.01, False), (0.0, True)])
def test_a_row_that_loses(ratio, lost):
    assert rows.loses(rows.empty_row(other_over_this=ratio)) is lost


def compared(x: int, ratio: float, saved: bool, order: str = "forward") -> rows.Row:
    row = measured("tasks", x, 1.0)
    return row | {"order": order, "ours": True, "best_other": "torch", "other_saved": saved, "other_over_this": ratio}


def test_summary_of_losses():
    table = [compared(1, 1.5, False), compared(4, 0.9, True), compared(16, 0.8, False), compared(64, 2.0, True)]
    assert list(report.losses(table)) == [
        "native: faster than every other in 2 of 4; loses most at tasks=16 g forward, 0.80x of torch; "
        "in 1 of the 2 to one that reads saved intermediates (+)"
    ]
    table[1] |= {"low_s": 1.0, "high_s": 1.0, "gb_per_s": 1.0, "error": 0.0, "saved": True}
    assert report.line(table[1]).startswith("* native +") and report.line(table[1]).endswith(" 0.90x LOSES")


def test_summary_in_a_sentence():
    table = [compared(1, 1.5, False), compared(4, 0.8, True), compared(16, 3.0, False)]
    lists = compared(64, 0.1, True) | {"provider": "lists"}
    assert report.summary([*table, lists]) == (
        "native is faster than every other provider in 2 of 3 cases, by a factor of 1.5 in the median, 3 at best, and "
        "0.8 at worst (tasks=4 g forward, against torch)."
    )
    wrong = compared(1, 1.5, False) | {"status": "WRONG: relative error 1.0e+00", "best_other": None}
    assert report.summary([*table, wrong]).startswith("Of ours, native failed or gave wrong numbers in 1 cases")
    assert report.summary([measured("tasks", 1, 1.0)]).startswith("Nothing was compared")


# The longest texts of each column.
WIDEST = {
    "median_s": 0.9996, "low_s": 0.1, "high_s": 9.0, "gb_per_s": 12345.0, "gflop_per_s": 123456.0, "floor_share": 0.123,
    "peak_bytes": 999_400_000, "error": 1e-10, "other_over_this": 12345.678,
}  # fmt: skip


def test_a_table_fits_in_100_columns():
    ours = compared(256, 0.01, False) | WIDEST | {"provider": "torch-formulas-compile", "saved": True}
    other = ours | {"ours": False, "best_other": None, "provider": "torch"}
    lines = [text for row in ([ours, other],) for text in report.table(row)]
    assert max(map(len, lines)) <= report.WIDTH
    assert lines[-1].endswith("fastest other") and lines[-2].endswith("12345.68x")
    long = report.wrapped("left out, kron: " + "tasks=64 CNN(2) forward, " * 20)
    assert max(map(len, long)) <= report.WIDTH and "".join(" ".join(long).split()).count("tasks=64") == 20
    # Nothing is cut, however long.
    assert report.wrapped("x" * 300) == ["x" * 300]


def test_summary_of_what_was_left_out():
    slow = f"{report.TOO_SLOW} 9 s, too long for 1 s per order"
    table = [rows.empty_row(axis="width", x=9, group="square", status="left out: 1 s were spent before it")]
    table += [measured("tasks", x, 1.0, name="kron") | {"status": slow} for x in (64, 256)]
    table += [measured("tasks", 1, None), measured("tasks", 1, 1.0)]
    assert list(report.left_out(table)) == [
        "left out, 1 points after the limit: width=9 square",
        "left out, kron, 2 times too slow for the budget: tasks=64 g forward, tasks=256 g forward",
    ]


def test_tasks_in_the_place_of_the_axis_own():
    settings = command.Settings(axes=("tasks", "psd"), groups=("CNN(2)", "conv_64"), tasks=(16, 3), limit=1.0)
    assert [(point.group, point.tasks) for point in settings.points() if point.axis == "tasks"] == [
        ("CNN(2)", 16), ("conv_64", 16), ("CNN(2)", 3), ("conv_64", 3),
    ]  # fmt: skip
    assert {point.tasks for point in settings.points() if point.axis == "psd"} == {points.TASKS}


CHOSEN = ("native", "lists", "torch-matmul", "learn2learn", "jax", "triton")


@needs_library
def test_files_of_a_run(tiny, tmp_path):
    said: list[str] = []
    settings = command.Settings(**tiny, axes=("tasks", "width", "hidden", "psd"), providers=CHOSEN[:4])
    assert command.run(settings, tmp_path / "out", said.append)
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    result = report.read(tmp_path / "out" / "results.json")
    assert list(table[0]) == list(rows.COLUMNS) == list(result["rows"][0]) == list(result["columns"])
    assert len(table) == len(result["rows"])
    for row, text in zip(result["rows"], table, strict=True):
        assert {key: "" if value is None else str(value) for key, value in row.items()} == text
    good = [row for row in result["rows"] if row["status"] == "ok"]
    for row in good:
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        assert row["error"] <= 1e-4
        if row["saved"]:
            # Its operations are not those of the model, nor its memory what one call shows.
            assert [row[key] for key in ("gflop_per_s", "floor_share", "peak_bytes")] == [None] * 3
            continue
        assert row["gflop_per_s"] == pytest.approx(row["flops"] / row["median_s"] / 1e9)
        floor = max(
            row["flops"] / result["roofs"]["gflop_per_s"], row["bytes"] / result["roofs"]["gb_per_s"]
        )  # fmt: skip
        assert row["floor_share"] == pytest.approx(floor / 1e9 / row["median_s"])
        assert row["peak_bytes"] > 0
    assert {(row["provider"], row["order"]) for row in good if row["saved"] and row["axis"] == "tasks"} == {
        (name, order) for name in ("lists", "torch-matmul", "learn2learn") for order in ORDERS[1:]
    }
    for axis, xs in {"tasks": {1, 2}, "width": {1, 3}, "hidden": {0, 1}, "psd": {0, 1}}.items():
        for order in ORDERS:
            assert {r["x"] for r in good if (r["axis"], r["order"], r["provider"]) == (axis, order, "native")} == xs
    assert {fit["axis"] for fit in result["fits"]} == {"tasks", "width", "hidden"}
    assert (result["format"], result["settings"]["repeats"]) == (report.FORMAT, 2)
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["roofline.png", "time-hidden.png", "time-psd.png", "time-tasks.png", "time-width.png"]
    for name in pictures:
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 100_000
    text = "\n".join(said)
    # hidden=0 is psd=0: eight points, of which the summary counts seven.
    compared = len({(row["axis"], row["x"], row["order"]) for row in good if row["provider"] == "native"})
    assert compared == 8 * 3 and f" of {7 * 3}" in next(line for line in said if line.startswith("native: faster"))
    assert "tasks=2  tiny, 2 tasks: double_backward" in text and "time ~ size^e" in text
    assert text.count("LOSES") == sum(rows.loses(row) for row in good)
    assert max(map(len, said)) <= report.WIDTH, max(said, key=len)
    assert sum(line.endswith("  fastest other") for line in said) == compared
    assert " ".join(said).endswith(")."), said[-3:]


@needs_library
def test_wrong_and_absent_providers_are_reported_and_not_timed(tiny, tmp_path, monkeypatch):
    def absent(device):
        raise ImportError("not here\nand a long recipe")

    def twice(name):
        right = providers.PROVIDERS[name]

        def wrong(case):
            orders = right.make(case)
            return {**orders, "backward": lambda: [2 * X for X in orders["backward"]()]}

        return right._replace(make=wrong)

    monkeypatch.setitem(providers.PROVIDERS, "learn2learn", providers.PROVIDERS["learn2learn"]._replace(check=absent))
    monkeypatch.setitem(providers.PROVIDERS, "torch-matmul", twice("torch-matmul"))
    settings = command.Settings(**tiny, axes=("tasks",), providers=CHOSEN)
    said: list[str] = []
    assert command.run(settings, tmp_path / "theirs", said.append)
    result = report.read(tmp_path / "theirs" / "results.json")
    assert {row["provider"] for row in result["rows"]} == set(CHOSEN)
    assert [row["status"] for row in result["rows"] if row["provider"] == "learn2learn"] == [
        "cannot run here: ImportError: not here"
    ]
    off = [row for row in result["rows"] if row["status"].startswith("WRONG: relative error 1.0e+00")]
    assert {(row["provider"], row["order"], row["x"]) for row in off} == {
        ("torch-matmul", "backward", 1), ("torch-matmul", "backward", 2),
    }  # fmt: skip
    assert all(row["median_s"] is None for row in result["rows"] if row["status"] != "ok")
    assert any("WRONG" in line for line in said)

    monkeypatch.setitem(providers.PROVIDERS, "native", twice("native"))
    settings = command.Settings(**tiny, axes=("tasks",), orders=("backward",), providers=("native", "lists"))
    assert not command.run(settings, tmp_path / "ours", said.append)


@needs_library
def test_points_beyond_the_limit_are_left_out_and_say_so(tiny, tmp_path):
    said: list[str] = []
    settings = command.Settings(**tiny, limit=1e-9, axes=("tasks", "psd"), providers=("native",))
    assert command.run(settings, tmp_path, said.append)
    result = report.read(tmp_path / "results.json")
    assert [(row["axis"], row["x"]) for row in result["rows"]] == [("tasks", 1), ("psd", 0), ("tasks", 2), ("psd", 1)]
    assert {row["status"] for row in result["rows"]} == {"left out: 1e-09 s were spent before it"}
    assert "tasks=2 tiny: left out: 1e-09 s were spent before it" in said
    assert said[-1] == "Nothing was compared: no order was measured of both ours and another provider."
    assert "left out, 4 points after the limit: tasks=1 tiny, psd=0 tiny, tasks=2 tiny, psd=1 tiny" in said


def test_compiling_is_left_out_of_a_quick_run_unless_asked_for():
    here, rest = command.available(command.Settings(quick=True))
    assert "torch-compile" not in here and "torch-matmul" in here
    assert {row["provider"] for row in rest} | set(here) == set(providers.PROVIDERS)
    (row,) = [row for row in rest if row["provider"] == "torch-compile"]
    assert row["status"].startswith("left out: --quick")
    assert list(command.available(command.Settings(quick=True, providers=("torch-compile",)))[0]) == ["torch-compile"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": ("depth",)}, "axes: expected some of tasks"),
        ({"groups": ("CNN(3)",)}, "groups: expected some of"),
        ({"providers": ("ours",)}, "providers: expected some of native"),
        ({"orders": ("third",)}, "orders: expected some of forward"),
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"tasks": (4, 0)}, "tasks: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"seconds": math.nan}, "seconds: expected seconds above 0, got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        command.Settings(**change)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="expected a folder for the results, got a file"):
        command.run(command.Settings(), tmp_path / "out", print)


@needs_library
def test_pictures_of_committed_results(tiny, tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "pictures"
    results.mkdir()
    (results / "other.json").write_text("{}")
    arguments = ["--results", str(results), "--out", str(out)]
    assert plot_results.main(arguments) == 1
    settings = command.Settings(**tiny, axes=("tasks",), providers=("native", "torch-matmul"))
    command.run(settings, tmp_path / "run", lambda line: None)
    (tmp_path / "run" / "results.json").rename(results / "machine.json")
    assert plot_results.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {"machine-time-tasks.png", "machine-roofline.png"}
    assert "machine-roofline.png" in capsys.readouterr().out


def test_a_picture_needs_two_points(tmp_path):
    result = {
        "rows": [measured("tasks", 1, 1.0) | {"ours": True}], "roofs": {"gflop_per_s": None},
        "settings": {"device": "cpu"}, "processor": "p", "torch_threads": 1,
    }  # fmt: skip
    assert plots.draw(result, tmp_path) == []


@needs_library
def test_benchmarks_for_pytest_run(tmp_path):
    pytest.importorskip("pytest_benchmark")
    # Benchmarks are off in a worker of xdist, and in what believes to be one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", str(BENCH),
            "-k", "overhead or forward and (native or torch-matmul)", "--benchmark-max-time=0.01",
            "--benchmark-min-rounds=1", f"--benchmark-json={tmp_path / 'out.json'}",
        ],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {item["group"] for item in found} == {
        "forward CNN(2), 16 tasks", "forward CNN(4), 16 tasks",
        "host time of one call: operator", "host time of one call: through autograd",
    }  # fmt: skip
    for item in found:
        assert item["extra_info"]["error"] <= 1e-4 and item["extra_info"]["machine"]["torch"] == torch.__version__
