"""What experiments compute: successive halving, results, and a runner that may be stopped at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from deadlines import seconds
from made_up_runs import record, scored

from experiments import __main__ as command
from experiments import jobs as jobs_module
from experiments import runner, training
from experiments.entry import Computed, Entry
from experiments.halving import Fixed, Following, Halving, Rung, StartOf
from experiments.jobs import Job, Record, decoded, encoded
from experiments.store import Results
from kfo_ext.runs import RunFolder

HALVING = Halving(
    base={"dataset": "glyphs", "meta_lr": 0.003},
    rates=(0.1, 0.2, 0.4),
    inits=("torch", "zero_head"),
    meta_lrs=(0.001, 0.003),
    first=200,
    rungs=(Rung(iterations=400, keep=3), Rung(iterations=800, keep=1)),
    seeds=(5, 6),
    tests=(scored(2),),
)


def job(rate: float, init: str = "torch", meta_lr: float = 0.003, seed: int = 5, iterations: int = 200, **facts) -> Job:
    settings = {"dataset": "glyphs", "meta_lr": meta_lr, "fast_lr": rate, "init": init, "seed": seed}
    return Job(settings=settings, iterations=iterations, **facts)


def stages(work, curve, ended=lambda job: 0) -> tuple[list[list[Job]], dict[str, Record]]:
    """The missing jobs of every stage, each stage done before the next."""
    records: dict[str, Record] = {}
    found = []
    while missing := work.missing(records):
        found.append(missing)
        records |= {each.key: record(each, curve, ended=ended(each)) for each in missing}
    return found, records


def peak(at: float):
    """Accuracies that are highest at an inner rate, a little higher with zero head and the outer rate 0.001."""

    def curve(settings, iteration):
        bonus = 0.01 * (settings.get("init") == "zero_head") + 0.002 * (settings["meta_lr"] == 0.001)
        return 0.8 - abs(settings["fast_lr"] - at) / 10 + bonus + iteration / 1e5

    return curve


def test_each_stage_follows_from_the_results_before():
    found, records = stages(HALVING, peak(0.2))
    grid, kept, others, last, finals = found
    assert grid == [job(rate, init) for rate in (0.1, 0.2, 0.4) for init in ("torch", "zero_head")]
    assert kept == [job(*each, iterations=400) for each in ((0.2, "zero_head"), (0.1, "zero_head"), (0.2, "torch"))]
    assert others == [job(0.2, "zero_head", 0.001, iterations=400)]
    assert last == [job(0.2, "zero_head", 0.001, iterations=800)]
    assert finals == [job(0.2, "zero_head", 0.001, seed, 800, tests=(scored(2),)) for seed in (5, 6)]
    assert HALVING.missing(records) == []
    assert HALVING.finals(records) == finals
    assert HALVING.tuning(records) == [*grid, *kept, *others, *last]


def test_a_stage_that_is_done_in_part_misses_the_rest():
    grid = HALVING.missing({})
    records = {each.key: record(each, peak(0.2)) for each in grid[:2]}
    assert HALVING.missing(records) == grid[2:]
    records |= {grid[2].key: record(replace(grid[2], iterations=100), peak(0.2))}
    assert HALVING.missing(records) == grid[2:]
    assert HALVING.tuning(records) == grid
    with pytest.raises(LookupError, match="the tuning is not done"):
        HALVING.finals(records)


def test_the_final_runs_are_known_before_they_are_done():
    _, records = stages(replace(HALVING, seeds=(5,)), peak(0.2))
    assert [each.settings["seed"] for each in HALVING.missing(records)] == [6]
    assert [each.settings["seed"] for each in HALVING.finals(records)] == [5, 6]


@pytest.mark.parametrize(
    ("at", "tried", "winner"),
    [
        (0.2, [0.1, 0.2, 0.4], 0.2),
        (0.8, [0.1, 0.2, 0.4, 0.8, 1.6], 0.8),
        (0.05, [0.025, 0.05, 0.1, 0.2, 0.4], 0.05),
        (50.0, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2], 3.2),
        (-1.0, [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4], 0.0125),
    ],
)
def test_a_grid_is_widened_where_its_edge_wins_three_times_at_most(at, tried, winner):
    found, records = stages(HALVING, peak(at))
    assert sorted({each.settings["fast_lr"] for stage in found for each in stage}) == tried
    assert {each.settings["fast_lr"] for each in HALVING.finals(records)} == {winner}


def test_one_rate_is_not_widened():
    found, _ = stages(replace(HALVING, rates=(0.1,)), peak(9.0))
    assert {each.settings["fast_lr"] for stage in found for each in stage} == {0.1}


def test_ties_go_to_the_first_of_the_grid():
    found, _ = stages(replace(HALVING, rates=(0.1, 0.2, 0.4)), lambda settings, at: 0.5)
    # 0.1 wins the tie, which is the edge.
    assert found[0][0].settings["fast_lr"] == 0.1
    assert [each.settings["fast_lr"] for each in found[1]] == [0.05, 0.05]


def test_scores_of_a_rung_are_those_up_to_it():
    """A record may hold more: another entry has trained the run for longer."""
    late = lambda settings, at: 0.9 if at > 200 and settings["fast_lr"] == 0.1 else peak(0.2)(settings, at)  # noqa: E731
    grid = HALVING.missing({})
    records = {each.key: record(replace(each, iterations=800), late) for each in grid}
    assert HALVING.tuning(records)[6].settings["fast_lr"] == 0.2


def test_a_run_that_ended_makes_room_for_the_next_best():
    """Here the best three of the first rung end before 400 iterations, and the best of the second before 800."""

    def ended(job):
        first = job.settings["fast_lr"] == 0.2 or job.settings == {**job.settings, "fast_lr": 0.1, "init": "zero_head"}
        second = job.settings["meta_lr"] == 0.001
        return 350 if first and not second and job.iterations > 200 else 700 if second and job.iterations > 400 else 0

    found, records = stages(HALVING, peak(0.2), ended)
    _, kept, room, others, last, more, finals = found
    assert kept == [job(*each, iterations=400) for each in ((0.2, "zero_head"), (0.1, "zero_head"), (0.2, "torch"))]
    assert room == [job(*each, iterations=400) for each in ((0.1, "torch"), (0.4, "zero_head"), (0.4, "torch"))]
    assert others == [job(0.1, "torch", 0.001, iterations=400)]
    assert last == [job(0.1, "torch", 0.001, iterations=800)]
    assert more == [job(0.1, "torch", iterations=800)]
    assert finals == [job(0.1, "torch", 0.003, seed, 800, tests=(scored(2),)) for seed in (5, 6)]
    assert HALVING.tuning(records) == [job for stage in found[:-1] for job in stage]


def test_where_all_runs_end_the_best_of_them_wins():
    found, records = stages(HALVING, peak(0.2), lambda job: 150)
    # Nothing of them is missing at later rungs, but for the other outer rate.
    assert [each.settings["meta_lr"] for stage in found[1:-1] for each in stage] == [0.001]
    assert HALVING.finals(records)[0].settings["fast_lr"] == 0.2


def test_a_single_rung_compares_the_outer_rates_too():
    work = replace(HALVING, rungs=(Rung(iterations=400, keep=1),))
    _, records = stages(work, peak(0.2))
    assert work.finals(records)[0].settings["meta_lr"] == 0.001


def test_bad_halvings_are_refused():
    with pytest.raises(ValueError, match=r"rates: expected ascending ones, got \(0.2, 0.1\)"):
        replace(HALVING, rates=(0.2, 0.1))
    with pytest.raises(ValueError, match="rungs: expected the last one to keep one run"):
        replace(HALVING, rungs=(Rung(iterations=400, keep=2),))


FIXED = Fixed(
    base={"dataset": "glyphs", "fast_lr": 0.1},
    variants={"a": {}, "b": {"fast_lr": 0.2}},
    iterations=300,
    seeds=(0, 1),
    tests=(),
)


def test_fixed_runs_are_each_variant_with_each_seed():
    (every,), records = stages(FIXED, lambda settings, at: 0.5)
    assert [(each.settings["fast_lr"], each.settings["seed"]) for each in every] == [
        (0.1, 0),
        (0.1, 1),
        (0.2, 0),
        (0.2, 1),
    ]
    del records[every[2].key]
    assert FIXED.missing(records) == [every[2]]


def test_a_test_that_was_not_made_is_missing():
    (every,), records = stages(FIXED, lambda settings, at: 0.5)
    work = replace(FIXED, tests=(scored(2),))
    assert len(work.missing(records)) == 4
    records[every[0].key].tests.append({**asdict(scored(2)), "mean": 0.5})
    assert len(work.missing(records)) == 3
    # There is nothing to test of a run that ended before its first validation.
    records[every[1].key] = record(every[1], lambda *_: 0.5, ended=50)
    assert len(work.missing(records)) == 2


def test_a_key_is_of_settings_and_numerics_alone(monkeypatch):
    one = job(0.1)
    assert one.key == replace(one, iterations=9, tests=(scored(3),)).key
    assert one.key == replace(one, settings=dict(reversed(one.settings.items()))).key
    assert one.key != job(0.2).key
    before = one.key
    monkeypatch.setattr(jobs_module, "NUMERICS", jobs_module.NUMERICS + 1)
    assert one.key != before


def test_scores_survive_their_letters():
    scores = [count / 57 for count in range(58)]
    assert decoded(encoded(scores, 57), 57) == scores
    assert encoded([0.0, 0.04, 1.0], 25) == "ABZ"
    # As float32 holds them.
    assert decoded(encoded([0.23999999463558197], 25), 25) == [0.24]


def test_scores_that_no_letter_holds_are_refused():
    with pytest.raises(ValueError, match="queries: expected at most 57 of a task, got 58"):
        encoded([0.0], 58)
    with pytest.raises(ValueError, match="scores: expected shares of 25 queries"):
        encoded([0.5], 25)


def entry(work, name: str = "made-up", **facts) -> Entry:
    return Entry(name=name, title="t", group="g", works={"cpu": work}, **facts)


def test_results_of_another_specification_stay_as_they_are(tmp_path, monkeypatch):
    one = Results(entry(FIXED), "cpu", tmp_path)
    done = record(FIXED.missing({})[0], lambda *_: 0.5)
    one.add(FIXED.missing({})[0].key, done, [{"commit": "abc"}])
    content = one.path.read_bytes()
    for other in (
        lambda: Results(entry(replace(FIXED, iterations=301)), "cpu", tmp_path),
        lambda: monkeypatch.setattr(jobs_module, "NUMERICS", 99) or Results(entry(FIXED), "cpu", tmp_path),
    ):
        found = other()
        assert found.path != one.path and found.records == {}
        found.add("key", replace(done, tests=[]), [{"commit": "def"}])
        assert one.path.read_bytes() == content
    assert len(list(one.path.parent.iterdir())) == 3


def test_results_are_read_as_they_were_written(tmp_path):
    one = Results(entry(FIXED), "cpu", tmp_path)
    first = FIXED.missing({})[0]
    one.add(first.key, record(first, lambda *_: 0.5), [{"commit": "abc"}, {"commit": "def"}])
    again = Results(entry(FIXED), "cpu", tmp_path)
    assert again.records == one.records and again.environments == [{"commit": "abc"}, {"commit": "def"}]
    assert again.records[first.key].environments == [0, 1] and not again.complete
    assert json.loads(one.path.read_text())["specification"]["iterations"] == 300


def test_tests_of_two_calls_are_merged_and_a_repeated_one_replaced(tmp_path):
    one, first = Results(entry(FIXED), "cpu", tmp_path), FIXED.missing({})[0]
    for tests, right in (((scored(2), scored(3)), 10), ((scored(3), scored(3, checkpoint="last")), 20)):
        one.add(first.key, record(replace(first, tests=tests), lambda *_: 0.5, lambda *_: right), [])  # noqa: B023
    kept = Results(entry(FIXED), "cpu", tmp_path).records[first.key]
    assert sorted((test["tasks"], test["checkpoint"], round(test["mean"], 9)) for test in kept.tests) == [
        (2, "best", 0.4),
        (3, "best", 0.8),
        (3, "last", 0.8),
    ]
    with pytest.raises(KeyError):
        kept.test(scored(99))


def test_an_entry_that_follows_waits_for_the_one_that_is_tuned(tmp_path):
    start = StartOf(of="first", work=replace(HALVING, inits=("x", "y")))
    at = Following(of="first", variants={"v": {"steps": 3}}, without=("init",), iterations=9, seeds=(0,), tests=())
    entries = {"first": entry(HALVING, "first"), "start": entry(start, "start"), "at": entry(at, "at")}
    first, second, third = (Results(each, "cpu", tmp_path, entries) for each in entries.values())
    assert second.work is third.work is None and not second.complete
    # The setting that won is enough.
    while missing := [each for each in HALVING.missing(first.records) if each.settings["seed"] == 5]:
        for each in missing:
            first.add(each.key, record(each, peak(0.2)), [])
    assert second.work == replace(HALVING, inits=("zero_head",))
    (only,) = third.work.missing({})
    assert only.settings == {"dataset": "glyphs", "meta_lr": 0.001, "fast_lr": 0.2, "steps": 3, "seed": 0}


def test_a_computed_entry_is_known_by_function_options_and_version():
    one = Computed(function=dict, options={"n": 3})
    keys = {entry(each).key("cpu") for each in (one, replace(one, version=2), replace(one, options={"n": 4}))}
    assert len(keys) == 3
    assert entry(replace(one, shown=print)).key("cpu") in keys


def test_an_unknown_name_says_the_nearest(capsys):
    assert command.main(["run", "omniglot-cnn2-mamml"]) == 2
    assert "got 'omniglot-cnn2-mamml'; the nearest are omniglot-cnn2-maml" in capsys.readouterr().err


def test_a_missing_data_set_is_named(capsys, tmp_path):
    arguments = ["run", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "omniglot-anil"]
    assert command.main(arguments) == 2
    assert "omniglot-anil: needs the data set omniglot, which is not in --data" in capsys.readouterr().err
    assert command.main(["run", "--data", str(tmp_path / "none"), "omniglot-anil"]) == 2
    assert "--data: expected a folder, got" in capsys.readouterr().err
    assert command.main(["run", "--jobs", "0"]) == 2
    assert "jobs: expected at least 1, got 0" in capsys.readouterr().err


# Runs of a second, one thread each.
TINY = {
    "dataset": "glyphs",
    "ways": 2,
    "shots": 1,
    "queries": 2,
    "layers": 1,
    "hidden": 4,
    "steps": 1,
    "method": "maml",
    "update": "none",
    "fast_lr": 0.1,
    "meta_batch": 2,
    "validation_every": 20,
    "validation_tasks": 4,
}


def test_tests_are_of_checkpoints_no_longer_trained_than_the_job(tmp_path):
    settings = {**TINY, "seed": 0, "validation_every": 2}
    longer = Job(settings=settings, iterations=4)
    training.carry_out(longer, tmp_path / longer.key, None)
    shorter = Job(settings=settings, iterations=2, tests=(scored(3), scored(3, checkpoint="last")))
    for _ in range(2):
        found, _ = training.carry_out(shorter, tmp_path / shorter.key, None)
        assert found.iterations == 2
        assert [test["iteration"] for test in found.tests] == [2, 2]
        assert [test["mean"] for test in found.tests] == [
            pytest.approx(sum(decoded(test["correct"], 4)) / 3) for test in found.tests
        ]


def test_a_test_that_is_not_finite_is_a_result(tmp_path, monkeypatch):
    def not_finite(*_, **__):
        raise FloatingPointError("tasks 0 to 2 of the list: loss is not finite")

    monkeypatch.setattr(training, "evaluate_run", not_finite)
    tested = Job(settings={**TINY, "seed": 0}, iterations=1, tests=(scored(3),))
    found, _ = training.carry_out(tested, tmp_path / tested.key, None)
    assert found.tests[0]["failure"] == "tasks 0 to 2 of the list: loss is not finite"
    assert tested.done_in({tested.key: found})
    assert "best tasks 0 to 2 of the list" in runner._outcome(found)


def test_a_run_whose_loss_is_not_finite_has_ended(tmp_path):
    wild = Job(settings={**TINY, "seed": 0, "fast_lr": 1e30, "steps": 5}, iterations=20, tests=(scored(3),))
    for _ in range(2):
        found, _ = training.carry_out(wild, tmp_path / wild.key, None)
        assert "iteration 1" in found.ended and found.at == [] and found.tests == []
        assert wild.done_in({wild.key: found})


# A program of its own: two entries, of two runs and of one.
PROGRAM = f"""
import sys
from pathlib import Path
from experiments.entry import Entry
from experiments.halving import Fixed
from experiments.jobs import Test
from experiments.runner import Runner

folder, iterations, slots = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
works = {{
    name: Fixed(base={TINY!r}, variants={{"": {{}}}}, iterations=iterations, seeds=seeds, tests=(Test(tasks=4),))
    for name, seeds in (("one", (0, 1)), ("two", (2,)))
}}
entries = [Entry(name=name, title=name, group="g", works={{"cpu": work}}) for name, work in works.items()]
sys.exit(not Runner(entries, "cpu", {{}}, folder / "runs", folder / "results", slots).run())
"""
ITERATIONS = 150


@contextmanager
def program(folder: Path, slots: int, iterations: int = ITERATIONS) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The program and the file of its output; in the end it and its workers are killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    output = folder / f"output-{len(list(folder.iterdir()))}.txt"
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(iterations), str(slots)]
    with open(output, "w") as file:
        process = subprocess.Popen(
            arguments, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process, output
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds(60)
    while not condition():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.02)


def lines(folder: Path) -> list[int]:
    """How many records each run has."""
    return [len(path.read_text().splitlines()) for path in folder.glob("runs/numerics-*/*/metrics.jsonl")]


def trained(folder: Path) -> bool:
    """Whether a process trains one of the runs."""
    return any(runner._in_use(path) for path in folder.glob("runs/numerics-*/*"))


def results(folder: Path) -> dict[str, dict]:
    """The runs of every result file, without what differs between two sessions."""
    found = {}
    for path in folder.glob("results/*/*.json"):
        for key, run in json.loads(path.read_text())["runs"].items():
            found[f"{path.parent.name} {key}"] = run
            del run["seconds"], run["environments"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, dict], list[str]]:
    """The results of two programs at once, and what each has said."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with program(folder, 1) as (one, first), program(folder, 1) as (other, second):
        one.wait(seconds(120))
        other.wait(seconds(120))
        return results(folder), [first.read_text(), second.read_text()]


def test_two_runs_at_once_take_different_entries(undisturbed):
    found, outputs = undisturbed
    assert sorted(name.split()[0] for name in found) == ["one", "one", "two"], outputs
    for name in ("one", "two"):
        assert sorted(f" {name}: fast_lr" in output for output in outputs) == [False, True], outputs


def test_a_run_that_was_killed_and_paused_resumes_to_the_same_results(tmp_path, undisturbed):
    with program(tmp_path, 2) as (process, _):
        wait_for(lambda: max(lines(tmp_path), default=0) > 30)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = sum(lines(tmp_path))
    with program(tmp_path, 2) as (process, output):
        wait_for(lambda: sum(lines(tmp_path)) > killed + 5)
        begin = time.monotonic()
        assert runner.pause(tmp_path / "runs") == 1
        assert time.monotonic() - begin < seconds(50)
        assert process.wait(1) == 1
        assert "stopping: each run saves after its meta-iteration" in output.read_text()
    with program(tmp_path, 1) as (process, output):
        assert process.wait(seconds(120)) == 0, output.read_text()
    assert results(tmp_path) == undisturbed[0]
    assert all(len(run["at"]) == 8 and len(run["tests"]) == 1 for run in undisturbed[0].values())
    assert runner.pause(tmp_path / "runs") == 0


def test_workers_save_and_end_when_their_parent_is_killed(tmp_path):
    with program(tmp_path, 1, iterations=100_000) as (process, _):
        wait_for(lambda: max(lines(tmp_path), default=0) > 5)
        process.kill()
        wait_for(lambda: not trained(tmp_path))


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path):
    folder = tmp_path / "run"
    assert not runner._in_use(folder)
    folder.mkdir()
    assert not runner._in_use(folder)
    with RunFolder(folder).writing():
        assert runner._in_use(folder)
    assert not runner._in_use(folder)
