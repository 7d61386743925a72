"""Scores of finished runs: at the run's own settings and at others, and what may be compared with what."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from states import WAVES
from tiny_archives import pixels, png, write_folder
from torch import nn
from torch.nn import functional as F

from kfo_ext.runs import RunFolder, checkpoint
from kfo_ext.trainer import (
    Config,
    Trainer,
    compare_runs,
    compare_scores,
    evaluate,
    evaluate_run,
    load_learner,
)
from kfo_ext.trainer.networks import NETWORKS, Network
from kfo_ext.trainer.recipe import build_family

GLYPHS = {
    "shots": 2, "queries": 2, "ways": 2, "hidden": 4, "steps": 2, "meta_batch": 2, "validation_tasks": 4,
    "iterations": 2, "validation_every": 2,
}  # fmt: skip


def finished(path, **options) -> RunFolder:
    trainer = Trainer.start(Config(**options), path)
    trainer.fit()
    return trainer.run


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A finished run on waves."""
    return finished(tmp_path / "run", **WAVES)


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory) -> RunFolder:
    """A finished run on glyphs."""
    return finished(tmp_path_factory.mktemp("glyphs") / "run", **GLYPHS)


def test_a_score_at_other_settings_is_a_file_of_its_own(run):
    usual = evaluate_run(run, tasks=4)
    before = usual.path.read_bytes()
    assert usual.path.name == "eval-test-best.json"
    for changes in ({"steps": 10}, {"inner_lr": 0.02}, {"precision": "bf16"}, {"shots": 3, "steps": 2}):
        other = evaluate_run(run, tasks=4, **changes)
        suffix = "".join(f"-{key}={other.settings[key]}" for key in other.settings if key in changes)
        assert other.path.name == f"eval-test-best{suffix}.json"
        written = json.loads(other.path.read_text())
        assert written["settings"] == {**usual.settings, **changes}
        assert written["iteration"] == other.iteration == usual.iteration
        assert other.interval != usual.interval
        assert usual.path.read_bytes() == before
        assert compare_runs(run, run, **changes)[0] == other
    # What does not change the score, or is the run's own setting, is the usual score.
    again = evaluate_run(run, tasks=4, steps=1, threads=1, workers=1, device="cpu")
    assert (again.path, again.interval) == (usual.path, usual.interval)
    _, learner, _ = load_learner(run, "best", steps=10)
    family = build_family(Config(**{**WAVES, "steps": 10}), "test", seed=0)
    expected = evaluate(learner, family, tasks=4).losses.tolist()
    assert json.loads((run.path / "eval-test-best-steps=10.json").read_text())["scores"] == pytest.approx(expected)


def test_compare_shows_settings_iterations_and_checkpoints_written_since(run, tmp_path):
    other = Trainer.start(Config(**{**WAVES, "steps": 3, "update": "none", "iterations": 2}), tmp_path / "other").run
    Trainer.resume(other.path).fit()
    for folder in (run, other):
        evaluate_run(folder, tasks=4, name="last")
    a, b, _ = compare_runs(run, other, name="last")
    assert (a.iteration, b.iteration) == (4, 2)
    assert (a.current, b.current) == (True, True)
    assert a.differing_settings(b) == "update: kfo and none, steps: 1 and 3"
    assert a.differing_settings(a) == ""
    Trainer.resume(other.path, iterations=6).fit()
    _, stale, _ = compare_runs(run, other, name="last")
    assert (stale.iteration, stale.current) == (2, False)
    evaluate_run(other, tasks=4, name="last")
    _, fresh, _ = compare_runs(run, other, name="last")
    assert (fresh.iteration, fresh.current) == (6, True)


def test_the_command_compares_in_the_open(kfo, run):
    evaluate_run(run, tasks=3)
    evaluate_run(run, tasks=3, precision="bf16")
    before = checkpoint.load(run.best)["progress"]["iteration"]
    _, out, _ = kfo("compare", run.path, run.path)
    total = Config.load(run.config).iterations
    assert out.count(f"(best checkpoint, iteration {before} of {total})\n") == 2
    checkpoint.save(run.best, {**checkpoint.load(run.best), "rng": {}})
    _, out, _ = kfo("compare", run.path, run.path, "--precision", "bf16")
    assert f"iteration {before} of {total}; best.pt has been written since: evaluate it again)" in out


def test_evaluated_runs_compare_only_on_the_same_tasks(tmp_path):
    runs = []
    for name, update in (("a", "kfo"), ("b", "none")):
        trainer = Trainer.start(Config(**{**GLYPHS, "update": update}), tmp_path / name)
        trainer.fit()
        runs.append(trainer.run)
    with pytest.raises(ValueError, match="not evaluated yet; run `kfo eval"):
        compare_runs(*runs)
    scores = [evaluate_run(run, tasks=6) for run in runs]
    a, b, gap = compare_runs(*runs)
    assert (a, b) == tuple(scores)
    assert gap.mean == pytest.approx(a.interval.mean - b.interval.mean)
    evaluate_run(runs[1], tasks=5)
    with pytest.raises(ValueError, match=r"different tasks \(tasks: 6 and 5, digest"):
        compare_runs(*runs)
    runs[1].evaluation("test", "best").write_text("{}")
    with pytest.raises(ValueError, match=r"eval-test-best\.json: not an evaluation written by kfo"):
        compare_runs(*runs)


def by_hand(run: RunFolder, steps: int, tasks: int, **changes) -> list[float]:
    """Losses on the queries of waves after plain gradient descent, task by task by autograd."""
    config, learner, _ = load_learner(run, "best")
    family = build_family(config.changed(**changes), "test", seed=0)
    losses = []
    for index in range(tasks):
        support, query = family.sample(index, 1)
        parameters = {name: p.detach().requires_grad_() for name, p in learner.model.named_parameters()}
        for _ in range(steps):
            loss = F.mse_loss(torch.func.functional_call(learner.model, parameters, support.x[0]), support.y[0])
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            pairs = zip(parameters.items(), gradients, strict=True)
            parameters = {name: p - config.inner_lr * gradient for (name, p), gradient in pairs}
        outputs = torch.func.functional_call(learner.model, parameters, query.x[0])
        losses.append(F.mse_loss(outputs, query.y[0]).item())
    return losses


def test_steps_shots_and_queries_are_those_asked_for(tmp_path):
    run = finished(tmp_path / "run", **{**WAVES, "update": "none", "steps": 2, "dtype": "float32"})
    for changes in ({}, {"steps": 0}, {"steps": 4}, {"shots": 9, "queries": 3}, {"steps": 1, "shots": 1}):
        score = evaluate_run(run, tasks=3, **changes)
        others = {name: value for name, value in changes.items() if name != "steps"}
        expected = by_hand(run, changes.get("steps", 2), 3, **others)
        assert score.content["scores"] == pytest.approx(expected, rel=1e-4), changes
        assert score.changes == changes == score.content["changes"]
        assert {name: score.settings[name] for name in changes} == changes
        order = [name for name in ("shots", "queries", "steps") if name in changes]
        suffix = "".join(f"-{name}={changes[name]}" for name in order)
        assert score.path.name == f"eval-test-best{suffix}.json"


def test_rates_of_each_step_serve_fewer_steps_and_no_more(tmp_path):
    options = {**WAVES, "update": "none", "per_step": True, "steps": 3, "dtype": "float32", "meta_lr": 0.05}
    run = finished(tmp_path / "run", **options)
    for steps in (0, 1, 3):
        learner = load_learner(run, "best")[1]
        learner.steps = steps
        expected = evaluate(learner, build_family(Config(**options), "test", seed=0), tasks=3).scores
        assert evaluate_run(run, tasks=3, steps=steps).content["scores"] == expected.tolist()
    with pytest.raises(ValueError, match=r"^steps: expected at most 3 as in training, .*per_step.*, got 4$"):
        evaluate_run(run, tasks=3, steps=4)


def test_the_runs_own_settings_give_the_usual_file(glyphs):
    usual = evaluate_run(glyphs, tasks=3)
    again = evaluate_run(glyphs, tasks=3, steps=2, shots=2, queries=2, ways=2, precision="ieee")
    assert again == usual
    assert usual.changes == {}
    assert usual.path.name == "eval-test-best.json"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 2.5}, TypeError, "steps: expected int, got 2.5"),
        ({"steps": True}, TypeError, "steps: expected int, got True"),
        ({"steps": None}, TypeError, "steps: expected int, got None"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"shots": 0}, ValueError, "shots: expected at least 1, got 0"),
        ({"queries": 1.0}, TypeError, "queries: expected int, got 1.0"),
        ({"shots": 19}, ValueError, "shots + queries: expected at most 20"),
        ({"tasks": 2.5}, TypeError, "tasks: expected an int, got 2.5"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
        ({"meta_lr": 0.1}, ValueError, "meta_lr: has no effect on an evaluation"),
        ({"step": 3}, ValueError, "unknown configuration key 'step'"),
        (
            {"ways": 3},
            ValueError,
            "ways: expected 2 as in training, on which the trained parameters depend, got 3 (mod",
        ),
        ({"steps": 9, "hidden": 8}, ValueError, "hidden: expected 4 as in training"),
        ({"update": "none"}, ValueError, "update: expected kfo as in training"),
        ({"dtype": "float64"}, ValueError, "dtype: expected float32 as in training"),
    ],
    ids=str,
)
def test_what_an_evaluation_cannot_change(changes, error, message, glyphs):
    before = set(glyphs.path.iterdir())
    with pytest.raises(error) as caught:
        evaluate_run(glyphs, **{"tasks": 3, **changes})
    assert str(caught.value).startswith(message)
    assert set(glyphs.path.iterdir()) == before


def test_a_damaged_checkpoint_is_not_blamed_on_the_changes(glyphs, tmp_path):
    run = RunFolder(shutil.copytree(glyphs.path, tmp_path / "copy"))
    state = checkpoint.load(run.best)
    name = next(iter(state["learner"]))
    checkpoint.save(run.best, {**state, "learner": {k: v for k, v in state["learner"].items() if k != name}})
    with pytest.raises(ValueError, match=re.escape(f"{run.best}: the checkpoint lacks parameter {name!r}")):
        evaluate_run(run, tasks=3, steps=9)


class Pooled(nn.Module):
    """Logits that are means of features: no parameter depends on their number."""

    def __init__(self, inputs: tuple[int, ...], ways: int) -> None:
        super().__init__()
        self.features = nn.Linear(28 * 28, 12)
        self.ways = ways

    def forward(self, x):
        return F.adaptive_avg_pool1d(self.features(x.flatten(1))[:, None], self.ways)[:, 0]


def test_other_ways_where_the_network_allows_them(tmp_path, monkeypatch):
    row = Network(help="any number of classes", make=Pooled, inputs=None)
    monkeypatch.setitem(NETWORKS, "pooled", row)
    options = {name: value for name, value in GLYPHS.items() if name != "hidden"}
    run = finished(tmp_path / "run", network="pooled", update="none", **options)
    score = evaluate_run(run, tasks=3, ways=4)
    assert (score.changes, score.path.name) == ({"ways": 4}, "eval-test-best-ways=4.json")


def test_scores_of_different_settings_are_not_compared(run, tmp_path):
    other = finished(tmp_path / "other", **{**WAVES, "update": "none"})
    ours, usual = evaluate_run(run, tasks=3, steps=4), evaluate_run(other, tasks=3)
    with pytest.raises(ValueError, match=r"evaluated with different settings \(steps: 4 and 1\); evaluate both alike"):
        compare_scores(ours, usual)
    with pytest.raises(ValueError, match=r"different settings \(steps: 1 and 4\)"):
        compare_scores(usual, ours)
    # Neither is there at the settings of the other, and what there is is named.
    with pytest.raises(
        ValueError,
        match=r"run/eval-test-best\.json: not evaluated yet; run `kfo eval .*/run --split test "
        r"--checkpoint best`; there is eval-test-best-steps=4\.json, of other settings",
    ):
        compare_runs(run, other)
    with pytest.raises(
        ValueError, match=r"other/eval-test-best-steps=4\.json: not evaluated yet; .* --steps 4`; there is"
    ):
        compare_runs(run, other, steps=4)
    same = evaluate_run(other, tasks=3, steps=4)
    a, b, gap = compare_runs(run, other, steps=4)
    assert (a, b) == (ours, same)
    assert gap == compare_scores(ours, same)
    assert gap.mean == pytest.approx(ours.interval.mean - same.interval.mean)


def test_a_score_under_another_name_is_refused(run):
    other = evaluate_run(run, tasks=3, steps=4)
    shutil.copy(other.path, run.evaluation("test", "best"))
    with pytest.raises(
        ValueError, match=r"eval-test-best\.json: evaluated with other settings than asked for \(steps: 1"
    ):
        compare_runs(run, run)


def test_a_run_trained_at_the_changed_setting_is_compared_by_its_usual_score(run, tmp_path):
    other = finished(tmp_path / "other", **{**WAVES, "steps": 4})
    evaluate_run(run, tasks=3, steps=4)
    usual = evaluate_run(other, tasks=3)
    assert compare_runs(run, other, steps=4)[1] == usual


def test_the_command_evaluates_and_compares_at_other_settings(kfo, run, tmp_path):
    other = finished(tmp_path / "other", **{**WAVES, "update": "none"})
    line = ("--steps", 0, "--shots", 3, "--queries", 4)
    for folder in (run, other):
        code, out, err = kfo("eval", folder.path, "--tasks", 3, *line)
        assert (code, err) == (0, "")
        expected = "shots 3 instead of the run's, queries 4 instead of the run's, steps 0 instead of the run's"
        assert expected in out
        assert f"written: {folder.path}/eval-test-best-shots=3-queries=4-steps=0.json" in out
    code, out, err = kfo("compare", run.path, other.path, *line)
    assert (code, err) == (0, "")
    # Without an inner step the update does not matter, but the networks are two.
    assert "paired difference: " in out
    code, _, err = kfo("compare", run.path, other.path)
    assert (code, err.count("\n")) == (2, 1)
    assert "not evaluated yet" in err and "of other settings" in err
    for arguments, message in (
        (("--steps", 2.5), "Invalid value for '--steps'"),
        (("--steps", -1), "Invalid value for '--steps': expected at least 0, got -1"),
        (("--shots", 0), "Invalid value for '--shots': expected at least 1, got 0"),
        (("--ways", 3), "ways: has no effect with dataset 'sinusoid'; it is an option of data set glyphs, "),
    ):
        code, _, err = kfo("eval", run.path, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_run_does_not_go_on_with_other_data_nor_is_it_scored_on_it(tmp_path):
    def images(folder, seed):
        classes = [f"{split}/{split}{number}" for split in ("train", "val", "test") for number in range(2)]
        names = [f"{name}/{i}.png" for name in classes for i in range(4)]
        return write_folder(tmp_path / folder, {name: png(pixels(seed + i, side=16)) for i, name in enumerate(names)})

    one, other, moved = images("one", 0), images("other", 100), images("moved", 0)
    sizes = {"ways": 2, "shots": 2, "queries": 2, "hidden": 4, "side": 16, "validation_tasks": 2, "meta_batch": 2}
    config = Config(dataset="folders", data_root=str(one), cache=str(tmp_path / "cache"), iterations=1, **sizes)
    run = Trainer.start(config, tmp_path / "run")
    run.fit()
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"last\.pt: the run began with other data than is there now"):
        Trainer.resume(tmp_path / "run", data_root=str(other), iterations=2)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="data_root: expected the data that the run was trained on, got other data in"):
        evaluate_run(run.run, data_root=str(other), tasks=2)
    score = evaluate_run(run.run, data_root=str(moved), tasks=2)
    assert score.content["scores"] == evaluate_run(run.run, tasks=2).content["scores"]
    assert Trainer.resume(tmp_path / "run", data_root=str(moved), iterations=2).fit().progress.iteration == 2
