"""experiments/wall_clock.py: the clock, learn2learn at equal settings, resuming, running alone, the picture."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.meta_task_loops import learn2learn
from experiments import contestants, runner, wall_clock
from experiments.contestants import Learn2Learn, Ours, apart
from experiments.entry import Computed, Entry, specification
from experiments.halving import Halving, Rung
from experiments.jobs import Job, Record
from experiments.registry import ENTRIES
from experiments.registry.beyond import RACE
from experiments.runner import Runner
from experiments.store import Results
from experiments.training import configuration
from experiments.wall_clock_figure import TITLES, drawing, median, shown
from experiments.workers import Result
from kfo_ext.trainer.evaluation import Cancelled
from kfo_ext.trainer.recipe import EVALUATION_SEED, build_family

GLYPHS = {
    "dataset": "glyphs", "network": "omniglot_cnn", "layers": 2, "hidden": 6, "init": "reference", "ways": 3,
    "shots": 2, "queries": 3, "steps": 3, "meta_batch": 2, "meta_lr": 0.01,
}  # fmt: skip
KFO = {**GLYPHS, "method": "maml", "update": "kfo", "fast_lr": 0.2}
MAML = {**GLYPHS, "method": "maml", "update": "none", "fast_lr": 0.6}
METHODS = {"kfo": KFO, "maml": MAML, "linnet": {**GLYPHS, "method": "linnet", "update": "none", "fast_lr": 0.1}}


def race(folder: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "settings": METHODS, "target": 1.0, "validate_every": 2, "validation_tasks": 4, "most_iterations": 3,
        "seeds": (0, 1), "threads": 1, "peers": ("kfo", "maml"),
    }  # fmt: skip
    return wall_clock.wall_clock(roots={}, folder=folder, **given | changes)


def without_seconds(run: Mapping[str, Any]) -> list[list[float]]:
    return [row[1:] for row in run["curve"]]


@pytest.mark.parametrize("settings", [KFO, MAML], ids=["kfo", "maml"])
def test_learn2learn_meta_trains_as_we_do(settings):
    """The same losses over several meta-steps, and the same accuracy after them: start, rates, Adam and tasks agree."""
    config = configuration(Job(settings={**settings, "dtype": "float64", "seed": 3}, iterations=5), None)
    tasks = build_family(config, "train", seed=3)
    ours, theirs = Ours(config), Learn2Learn(config, tasks.sample(0, 2))
    losses = [[each.iterate(tasks.sample(i, 2)) for i in range(5)] for each in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    assert len({round(loss, 4) for loss in losses[0]}) == 5
    validation = build_family(config, "validation", seed=EVALUATION_SEED)
    scores = [each.accuracy(validation, 6, lambda: False) for each in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1])
    assert not (scores[0] * 54) % 1 > 1e-6


def test_every_method_is_measured_with_every_seed(tmp_path):
    value = race(tmp_path)
    assert list(value["runs"]) == ["kfo", "maml", "linnet", "learn2learn kfo", "learn2learn maml"]
    assert set(value["apart"]) == {"kfo", "maml"} and max(value["apart"].values()) < 1e-10
    assert value["settings"] == METHODS
    for runs in value["runs"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            seconds, iterations, _ = zip(*run["curve"])
            # The last one too, though no validation is due then.
            assert iterations == (2, 3) and 0 < seconds[0] < seconds[1]
            assert (run["seconds"], run["iterations"], run["ended"]) == (None, None, "")
            assert run["load"] >= 0 and run["commit"]
    first, second = value["runs"]["kfo"]
    assert without_seconds(first) != without_seconds(second)


def test_training_is_that_of_kfo_train(tmp_path):
    """The accuracies of a run of the trainer at the same settings."""
    from kfo_ext.runs.metrics import is_validation, read_metrics
    from kfo_ext.trainer import Trainer

    settings = {**KFO, "validation_every": 2, "validation_tasks": 4}
    found = race(tmp_path / "race", settings={"kfo": settings}, peers=(), seeds=(5,), most_iterations=6)
    trainer = Trainer.start(configuration(Job(settings={**settings, "seed": 5}, iterations=6), None), tmp_path / "run")
    trainer.fit()
    expected = [each for each in read_metrics(trainer.run.metrics) if is_validation(each)]
    assert [[each["iteration"], round(each["validation_accuracy"], 5)] for each in expected] == without_seconds(
        found["runs"]["kfo"][0]
    )


class Clock:
    """A clock that only the family and the contestant below move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.scores = iter([0.25, 0.5, 0.75, 1.0])
        self.fails_at = 0

    def sample(self, index: int, tasks: int) -> str:
        self.now += 10
        return f"batch {index} of {tasks}"

    def iterate(self, batch: str) -> float:
        self.now += 1
        self.calls.append(batch)
        if len(self.calls) == self.fails_at:
            raise FloatingPointError("the loss is nan")
        return 0.0

    def accuracy(self, *_: Any) -> float:
        self.now += 1000
        return next(self.scores)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(wall_clock, "build_family", lambda *_, **__: made)
    monkeypatch.setattr(wall_clock, "_made", lambda *_: made)
    monkeypatch.setattr(wall_clock, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def measured(folder: Path, **changes: Any) -> dict[str, Any]:
    value = race(folder, settings={"maml": MAML}, peers=(), seeds=(0,), most_iterations=9, **changes)
    return value["runs"]["maml"][0]


def test_the_clock_counts_training_and_sampling_alone(clock, tmp_path):
    run = measured(tmp_path, target=0.75)
    assert run["curve"] == [[22, 2, 0.25], [44, 4, 0.5], [66, 6, 0.75]]
    assert (run["seconds"], run["iterations"], run["ended"]) == (66, 6, "")
    # One is thrown away; the others are the stream of the trainer.
    assert clock.calls == ["batch 0 of 2", *(f"batch {i} of 2" for i in range(6))]


def test_threads_are_its_own(clock, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(clock, "iterate", lambda _: seen.append(torch.get_num_threads()) or len(seen) < 3 or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(tmp_path, threads=before + 2)
    assert seen == [before + 2] * 3 and torch.get_num_threads() == before


def test_what_diverges_ends(clock, tmp_path):
    clock.fails_at = 5
    run = measured(tmp_path, target=0.75)
    assert run["curve"] == [[22, 2, 0.25]]
    assert (run["seconds"], run["iterations"]) == (None, None)
    assert run["ended"] == "iteration 4: the loss is nan"


def test_a_stop_loses_one_measurement_at_most(tmp_path, monkeypatch):
    calls, real = [], Ours.iterate

    def iterate(self: Ours, batch: Any) -> float:
        calls.append((self.config.update, self.config.method, self.config.seed))
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(Ours, "iterate", iterate)
    with pytest.raises(Cancelled):
        race(tmp_path, peers=())
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # Four iterations each, one of which is thrown away.
    assert [path.name.split("-")[0] for path in kept] == ["kfo"] and len(calls) == 7
    whole = race(tmp_path, peers=())
    assert len(calls) == 7 + 5 * 4
    assert calls[7:11] == [("none", "maml", 0)] * 4
    assert [calls[7 + 4 * i][2] for i in range(5)] == [0, 0, 1, 1, 1]
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert race(tmp_path, peers=()) == whole and len(calls) == 27
    # Other settings are other measurements.
    race(tmp_path, peers=(), settings={"maml": {**MAML, "fast_lr": 0.5}}, seeds=(0,))
    assert len(calls) == 31


@pytest.mark.parametrize("change", [{"lr": 0.2001}, {"steps": 2}], ids=str)
def test_nothing_is_timed_at_other_settings(tmp_path, monkeypatch, change):
    monkeypatch.setattr(contestants, "learn2learn", lambda case: learn2learn(case._replace(**change)))
    with pytest.raises(ValueError, match="kfo: expected learn2learn's first meta-gradients to be ours in float64"):
        race(tmp_path, settings={"kfo": KFO}, peers=("kfo",))
    assert not list(tmp_path.iterdir())


def test_apart_is_of_both_losses_and_gradients(monkeypatch):
    config = configuration(Job(settings={**KFO, "seed": 0}, iterations=1), None)
    first = build_family(config, "train", seed=0).sample(0, 2)
    assert apart(config, first) < 1e-10

    def broken(case: Any) -> Any:
        loop = learn2learn(case)
        run = loop.run
        loop.run = lambda: run() * (1 + 1e-3)
        return loop

    monkeypatch.setattr(contestants, "learn2learn", broken)
    assert apart(config, first) == pytest.approx(1e-3)


HIDDEN = {**KFO, "hidden_layers": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.0}, "target: expected an accuracy above 0, at most 1, got 0.0"),
        ({"target": 90}, "target: expected an accuracy above 0, at most 1, got 90"),
        ({"seeds": ()}, "seeds: expected at least one"),
        ({"seeds": (1, 1)}, "seeds: expected at least one, each once"),
        ({"settings": {}}, "settings: expected at least one method"),
        ({"validation_tasks": 1}, "validation_tasks: expected at least 2"),
        ({"validate_every": 0}, "validate_every: expected at least 1"),
        ({"threads": 0}, "threads: expected at least 1"),
        ({"peers": ("anil",)}, "peers: expected methods of settings, got 'anil'"),
        ({"peers": ("kfo", "kfo")}, "peers: expected each once"),
        ({"peers": ("linnet",)}, "peers: expected method = 'maml', got 'linnet'"),
        ({"settings": {"kfo": HIDDEN}, "peers": ("kfo",)}, "peers: expected hidden_layers = 0, got 1"),
        ({"settings": {"kfo": {**KFO, "adapt_update": False}}, "peers": ("kfo",)}, "peers: expected adapt_update = T"),
        ({"settings": {"kfo": {**KFO, "clip_norm": 1.0}}, "peers": ("kfo",)}, "peers: expected clip_norm = 0.0, got 1"),
        ({"settings": {"x": {**MAML, "update": "meta_sgd"}}, "peers": ("x",)}, "peers: expected a method with an upd"),
        ({"settings": {"kfo": {**KFO, "accumulate": 2}}, "peers": ()}, "settings: expected accumulate = 1, got 2"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        race(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_without_learn2learn(tmp_path, monkeypatch):
    def absent() -> None:
        raise ImportError("learn2learn is not installed.")

    monkeypatch.setattr(wall_clock, "light_import", absent)
    with pytest.raises(ValueError, match=r"peers: learn2learn is not installed[^$]*or measure without: peers=\(\)"):
        race(tmp_path)
    value = race(tmp_path, settings={"maml": MAML}, peers=(), seeds=(0,))
    assert value["learn2learn"] is None and list(value["runs"]) == ["maml"]


def test_the_entry_of_the_registry():
    entry = ENTRIES["beyond-wall-clock"]
    assert entry.alone and [each.name for each in ENTRIES.values() if each.alone] == [entry.name]
    real, smoke = entry.works["cpu"], entry.works["ci"]
    assert isinstance(real, Computed) and isinstance(smoke, Computed)
    assert real.of == RACE and set(TITLES) == set(RACE) == set(smoke.options["settings"])
    assert set(real.options["peers"]) <= set(RACE)
    assert all(isinstance(ENTRIES[name].works["cpu"], Halving) for name in RACE)
    assert {*real.options, "settings"} == set(smoke.options)
    for name, settings in smoke.options["settings"].items():
        config = configuration(Job(settings=settings, iterations=2), Path("absent"))
        contestants._check("settings", config, contestants.OF_OURS)
        if name in real.options["peers"]:
            contestants.check_peer(config)


def tuned(rate: float) -> tuple[Entry, Record]:
    """An entry of one run, and its record."""
    work = Halving(
        base=GLYPHS, rates=(rate,), inits=("torch",), meta_lrs=(0.01,), first=1, rungs=(Rung(iterations=1, keep=1),),
        seeds=(0,), tests=(),
    )  # fmt: skip
    (job,) = work.missing({})
    record = Record(
        settings=job.settings, iterations=1, at=[1], accuracy=[0.5], interval=[0.1], training=[0.5], seconds=1.0
    )
    return Entry(name=f"tuned-{rate}", title="", group="g", works={"ci": work}), record


def test_a_function_may_follow_other_entries(tmp_path):
    found = [tuned(rate) for rate in (0.25, 0.5)]
    work = Computed(function=dict, options={"target": 1}, of=tuple(entry.name for entry, _ in found))
    entry = Entry(name="follows", title="", group="g", works={"ci": work})
    others = {each.name: each for each, _ in found}
    # Its key is known before the results; without `of` it is what it was before there was one.
    assert specification(work)["of"] == list(work.of)
    assert set(specification(Computed(function=dict))) == {"function", "options", "version"}
    results = Results(entry, "ci", tmp_path, others)
    path = results.path
    for each, record in found:
        assert results.work is None and not results.complete
        Results(each, "ci", tmp_path).add(Job(settings=record.settings, iterations=1).key, record, [])
    ready = results.work
    assert isinstance(ready, Computed) and results.path == path
    settings = {f"tuned-{rate}": {**GLYPHS, "fast_lr": rate, "init": "torch"} for rate in (0.25, 0.5)}
    assert ready.options == {"target": 1, "settings": settings}
    results.set({"settings": ready.options["settings"]}, [])
    assert Results(entry, "ci", tmp_path, others).complete
    # What was computed at the settings of earlier winners is out of date.
    results.set({"settings": {**settings, "tuned-0.5": {**settings["tuned-0.5"], "fast_lr": 2.0}}}, [])
    assert not Results(entry, "ci", tmp_path, others).complete


class FakeWorker:
    """Does its work at once, in this process; of those at work the last one that began ends first."""

    alive = True
    at_work: list[FakeWorker] = []  # noqa: RUF012
    beside: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.connection = self
        self.name = ""

    def start(self, task: Any) -> None:
        self.name = task.folder.name.split("-")[0]
        for other in self.at_work:
            self.beside[other.name].append(self.name)
        self.beside[self.name] = [other.name for other in self.at_work]
        self.at_work.append(self)

    def result(self) -> Result:
        self.at_work.remove(self)
        return Result({"done": self.name})

    def dismiss(self) -> None:
        pass

    def join(self, seconds: float) -> None:
        pass


def test_what_runs_alone_has_nothing_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(runner, "wait", lambda *_, **__: FakeWorker.at_work[-1:])
    monkeypatch.setattr(FakeWorker, "beside", {})
    entries = [
        Entry(name=name, title="", group="g", works={"ci": Computed(function=dict)}, alone=name.startswith("alone"))
        for name in ("alone1", "a", "alone2", "b", "c", "d")
    ]
    assert Runner(entries, "ci", {}, tmp_path / "runs", tmp_path / "results", jobs=2).run()
    assert set(FakeWorker.beside) == {entry.name for entry in entries}
    assert FakeWorker.beside["alone1"] == FakeWorker.beside["alone2"] == []
    # The others do not wait: `a` takes longest.
    assert FakeWorker.beside["a"] == ["b", "c", "d"]
    assert all(Results(entry, "ci", tmp_path / "results").complete for entry in entries)


def made_up(seconds: float | None, best: float = 0.9, ended: str = "") -> dict[str, Any]:
    last = seconds or 40.0
    curve = [[last / 3, 25, 0.5], [last, 50, best]] if best else []
    return {"seed": 0, "seconds": seconds, "iterations": seconds and 50, "ended": ended, "curve": curve}


def value_of(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "target": 0.9, "validate_every": 25, "validation_tasks": 200, "most_iterations": 2000, "threads": 2,
        "seeds": [0, 1, 2], "runs": runs, "peers": ["omniglot-cnn2-kfo"], "learn2learn": "0.2.0", "apart": {"x": 2e-14},
    }  # fmt: skip


def test_the_median_counts_what_was_not_reached_as_longest():
    slow, fast, never = made_up(9.0), made_up(3.0), made_up(None, 0.8)
    assert median([slow, never, fast]) is slow
    assert median([never, fast, never]) is never
    assert median([fast]) is fast


RUNS = {
    "omniglot-cnn2-kfo": [made_up(12.0), made_up(15.5), made_up(1300.0)],
    "omniglot-cnn2-maml": [made_up(None, 0.83), made_up(None, 0.82), made_up(900.0)],
    "omniglot-cnn2-linnet": [made_up(None, 0.0, "iteration 3: the loss is nan")] * 3,
    "learn2learn omniglot-cnn2-kfo": [made_up(1234.0)] * 3,
}


def test_the_picture_is_the_same_to_the_byte():
    svg = drawing(value_of(RUNS))
    assert svg == drawing(value_of(RUNS))
    text = svg.decode()
    for words in (
        "seconds of meta-training", "accuracy on validation classes (%)", "seconds of meta-training to 90 %",
        "META-KFO", "learn2learn: META-KFO", "15.5 s", "1,234 s", "not finite: iteration 3",
        "the median of 3 seeds, 2 threads",
    ):  # fmt: skip
        assert words in text
    # Of two seeds of three that have not reached it, the middle one.
    assert "not reached, best 83.0 %" in text
    assert "one seed" in drawing({**value_of({"x": [made_up(3.0)]}), "seeds": [0]}).decode()


def test_the_report_shows_the_seconds_of_every_seed():
    text, pictures = shown(value_of(RUNS))
    assert pictures == {"wall-clock.svg": drawing(value_of(RUNS))} and "](paper/wall-clock.svg)" in text
    for line in (
        "| META-KFO | 12.0, 15.5, 1,300.0 | 50, 50, 50 | 8.85 |",
        "| MAML | none, none, 900.0 | none, none, 50 | 6.53 |",
        "| LinNet | none, none, none | none, none, none | 0 |",
        "| learn2learn: META-KFO | 1,234.0, 1,234.0, 1,234.0 | 50, 50, 50 | 24.7 |",
        "learn2learn 0.2.0 meta-trains from the same start",
        "up to 2e-14",
    ):
        assert line in text
    without, _ = shown({**value_of({"x": [made_up(3.0)]}), "peers": [], "apart": {}})
    assert "learn2learn" not in without
