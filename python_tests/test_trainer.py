"""Training: exact resume, what stops it, what it writes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from states import assert_same
from torch import nn

from kfo_ext import MAML
from kfo_ext.runs import RunFolder, checkpoint, plot_runs
from kfo_ext.runs.metrics import Metrics, is_validation, read_metrics
from kfo_ext.runs.progress import Progress
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.trainer import (
    Config,
    Trainer,
    evaluate,
    load_learner,
    loop,
    mean_interval,
    paired_difference,
)
from kfo_ext.trainer.evaluation import Cancelled
from kfo_ext.trainer.recipe import build_family, build_learner

TINY = {"shots": 2, "queries": 2, "hidden": 4, "steps": 2, "meta_batch": 2, "validation_tasks": 4}
WAVES = {**TINY, "dataset": "sinusoid", "inner_lr": 0.01, "iterations": 6, "validation_every": 3}
GLYPHS = {**TINY, "dataset": "glyphs", "ways": 2, "iterations": 4, "validation_every": 2}
CASES = {
    "waves-none": {**WAVES, "update": "none"},
    "waves-kfo": WAVES,
    "waves-decay-clip": {**WAVES, "schedule": "half_life", "meta_lr_half_life": 2, "clip_norm": 0.1},
    "glyphs-maml": GLYPHS,
    "glyphs-anil": {**GLYPHS, "method": "anil", "hidden_layers": 1, "bias": True},
    "glyphs-first-order": {**GLYPHS, "first_order": True, "adapt_update": False, "psd": False},
}


def state_of(trainer: Trainer) -> dict:
    return {
        "learner": trainer.learner.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": {**vars(trainer.progress), "elapsed": None},
        "metrics": [{**record, "elapsed": None} for record in read_metrics(trainer.run.metrics)],
    }


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_resume_is_bit_exact(options, tmp_path):
    whole = Trainer.start(Config(**options), tmp_path / "whole")
    whole.fit()
    expected = state_of(whole)
    half = Trainer.start(Config(**{**options, "iterations": options["iterations"] // 2}), tmp_path / "parts")
    half.fit()
    torch.manual_seed(99)
    second = Trainer.resume(tmp_path / "parts", iterations=options["iterations"])
    second.fit()
    assert second.optimizer.state_dict()["state"], "Adam's state must be part of the comparison"
    assert_same(state_of(second), expected)


def test_resume_keeps_the_random_state(tmp_path):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    torch.rand(7)
    trainer.fit()
    expected = torch.get_rng_state()
    torch.rand(3)
    Trainer.resume(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), expected)


def test_workers_do_not_change_the_result(tmp_path):
    trainers = [Trainer.start(Config(**WAVES, workers=workers), tmp_path / str(workers)) for workers in (0, 2)]
    for trainer in trainers:
        trainer.fit()
    assert_same(*(trainer.learner.state_dict() for trainer in trainers))


def test_resume_changes_only_what_may_change(tmp_path):
    Trainer.start(Config(**WAVES), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"last\.pt: the checkpoint is of another configuration \(inner_lr: expected 0.5"
    ):
        Trainer.resume(tmp_path / "run", inner_lr=0.5)


class NaNAt:
    """A family whose meta-batch `index` has a NaN in the support examples of its last task."""

    def __init__(self, family, index: int) -> None:
        self.family, self.index = family, index

    def sample(self, index: int, tasks: int) -> TaskBatch:
        batch = self.family.sample(index, tasks)
        if index != self.index:
            return batch
        x = batch.support.x.clone()
        x[-1] = math.nan
        return TaskBatch(Examples(x, batch.support.y), batch.query)


def test_nonfinite_loss_names_the_place_and_saves_nothing(tmp_path):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.tasks = NaNAt(trainer.tasks, 4)
    with pytest.raises(
        FloatingPointError, match=r"iteration 5: .*step 1 .*task 1.*--inner-lr.*late in training.*--clip-norm"
    ):
        trainer.fit()
    state = checkpoint.load(trainer.run.last)
    assert state["progress"]["iteration"] == 3
    assert [r["iteration"] for r in read_metrics(trainer.run.metrics) if not is_validation(r)] == [1, 2, 3, 4]
    assert all(p.isfinite().all() for p in trainer.learner.parameters())
    Trainer.resume(tmp_path / "run").fit()
    assert [r["iteration"] for r in read_metrics(trainer.run.metrics) if not is_validation(r)] == [1, 2, 3, 4, 5, 6]


def test_nonfinite_validation_names_the_place_and_saves_nothing(tmp_path):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    before = trainer.run.last.read_bytes()
    trainer.validation_tasks = NaNAt(trainer.validation_tasks, 2)
    match = r"validation after iteration 3: tasks 2 to 3 of the list: the support loss of step 1 of task 0 is nan"
    with pytest.raises(FloatingPointError, match=match):
        trainer.fit()
    assert trainer.run.last.read_bytes() == before
    assert not trainer.run.best.exists()


@pytest.mark.parametrize("dataset", ["glyphs", "sinusoid"])
def test_default_configurations_train(dataset, tmp_path):
    config = Config(dataset=dataset, iterations=3, meta_batch=4, validation_tasks=4)
    assert config.inner_lr == {"glyphs": 0.1, "sinusoid": 0.01}[dataset]
    assert Trainer.start(config, tmp_path / "run").fit().reason == "finished"


def test_nonfinite_gradient_stops_before_the_step(tmp_path):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    name, parameter = next(iter(trainer.learner.named_parameters()))
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=f"iteration 1: the meta-gradient of {name} is not finite"):
        trainer.fit()
    assert torch.equal(parameter, before)


def test_the_outer_learning_rate_halves(tmp_path):
    trainer = Trainer.start(Config(**WAVES, meta_lr=0.004, schedule="half_life", meta_lr_half_life=2), tmp_path / "run")
    trainer.fit()
    rates = [record["learning_rate"] for record in read_metrics(trainer.run.metrics) if "learning_rate" in record]
    assert rates == pytest.approx([0.004 * 0.5 ** (i / 2) for i in range(WAVES["iterations"])])
    assert trainer.optimizer.param_groups[0]["lr"] == rates[-1]


def test_a_long_meta_gradient_is_scaled_to_the_limit_and_a_short_one_kept(tmp_path):
    def gradients(clip_norm: float) -> torch.Tensor:
        config = Config(**{**WAVES, "iterations": 1}, clip_norm=clip_norm)
        trainer = Trainer.start(config, tmp_path / f"clip-{clip_norm}")
        trainer.fit()
        return torch.cat([p.grad.flatten() for p in trainer.learner.parameters()])

    free = gradients(0.0)
    limit = free.norm().item() / 3
    torch.testing.assert_close(gradients(limit), free / 3, rtol=1e-4, atol=1e-7)
    assert torch.equal(gradients(limit * 10), free)


class SignalAt:
    """A family that raises a signal when meta-batch `index` is drawn.

    In this thread: another one may receive os.kill's late, and two of them as one.
    """

    def __init__(self, family, index: int, number: int) -> None:
        self.family, self.index, self.number = family, index, number

    def sample(self, index: int, tasks: int) -> TaskBatch:
        if index == self.index:
            signal.raise_signal(self.number)
        return self.family.sample(index, tasks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_saves(number, tmp_path):
    before = signal.getsignal(number)
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.tasks = SignalAt(trainer.tasks, 1, number)
    assert trainer.fit().reason == "interrupted"
    assert checkpoint.load(trainer.run.last)["progress"]["iteration"] == 2
    assert signal.getsignal(number) is before


@pytest.fixture
def python_handles_sigint():
    """A process started in the background of a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_aborts(python_handles_sigint, tmp_path, monkeypatch):
    # At once, not after a second.
    monkeypatch.setattr("kfo_ext.trainer.signals.TOGETHER", 0.0)
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    family = SignalAt(trainer.tasks, 1, signal.SIGINT)
    trainer.tasks = SignalAt(family, 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert checkpoint.load(trainer.run.last)["progress"]["iteration"] == 0


def test_a_signal_in_a_validation_leaves_it_to_the_resumed_run(tmp_path):
    whole = Trainer.start(Config(**WAVES), tmp_path / "whole")
    whole.fit()
    expected = state_of(whole)
    trainer = Trainer.start(Config(**WAVES), tmp_path / "parts")
    trainer.validation_tasks = SignalAt(trainer.validation_tasks, 0, signal.SIGINT)
    assert trainer.fit().reason == "interrupted"
    assert (trainer.progress.iteration, trainer.progress.validated) == (3, 0)
    resumed = Trainer.resume(tmp_path / "parts")
    resumed.fit()
    assert_same(state_of(resumed), expected)


def test_patience_stops_after_so_many_worse_validations(tmp_path):
    options = {**WAVES, "validation_every": 1, "iterations": 50, "meta_lr": 1e-30, "patience": 2}
    outcome = Trainer.start(Config(**options), tmp_path / "run").fit()
    assert outcome.reason == "patience"
    assert outcome.progress.iteration - outcome.progress.best_iteration == 2


def test_time_budget_ends_with_a_validation_and_a_save(tmp_path, monkeypatch):
    trainer = Trainer.start(Config(**{**WAVES, "iterations": 10**9, "validation_every": 10**9}), tmp_path / "run")
    # A clock by which an iteration takes a second.
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(trainer.progress.iteration)))
    outcome = trainer.fit(time_budget=2.5)
    assert outcome.reason == "time budget"
    assert outcome.progress.validated == outcome.progress.iteration == 3
    assert checkpoint.load(trainer.run.best)["progress"]["iteration"] == outcome.progress.iteration
    with pytest.raises(ValueError, match="time_budget: expected seconds, at least 0, got -1"):
        trainer.fit(time_budget=-1)


def test_best_is_by_accuracy_or_for_regression_by_loss(tmp_path):
    for name, options in {"waves": WAVES, "glyphs": GLYPHS}.items():
        trainer = Trainer.start(Config(**{**options, "validation_every": 1, "meta_lr": 0.05}), tmp_path / name)
        trainer.fit()
        records = [r for r in read_metrics(trainer.run.metrics) if is_validation(r)]
        sign, measure = (-1, "validation_loss") if name == "waves" else (1, "validation_accuracy")
        best = max(records, key=lambda r: sign * r[measure])
        assert trainer.progress.best_iteration == best["iteration"]
        assert trainer.progress.best_score == pytest.approx(sign * best[measure])
        assert checkpoint.load(trainer.run.best)["progress"]["iteration"] == best["iteration"]


def test_the_run_folder_holds_what_it_promises(tmp_path):
    config = Config(**GLYPHS)
    run = Trainer.start(config, tmp_path / "run").run
    Trainer.resume(run.path).fit()
    names = {path.name for path in run.path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "curve.png", "environment.json", ".lock"}
    assert Config.load(run.config) == config
    assert run.curve.read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    training = {"iteration", "loss", "accuracy", "learning_rate", "elapsed"}
    validation = {"validation_loss", "validation_loss_interval", "validation_accuracy", "validation_interval"}
    assert [set(r) for r in records] == [training, training, {"iteration", "elapsed"} | validation] * 2
    assert [r["iteration"] for r in records] == [1, 2, 2, 3, 4, 4]
    assert records[0]["learning_rate"] == config.meta_lr
    (session,) = json.loads(run.environment.read_text())
    assert {"command", "processor", "cores", "python", "torch", "kfo_ext", "commit"} <= session.keys()


def test_a_taken_folder_is_refused(tmp_path):
    Trainer.start(Config(**WAVES), tmp_path / "run")
    with pytest.raises(ValueError, match="run: already holds a run"):
        Trainer.start(Config(**WAVES), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="other: expected an absent or empty folder"):
        Trainer.start(Config(**WAVES), tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a folder"):
        Trainer.start(Config(**WAVES), tmp_path / "file")
    with pytest.raises(ValueError, match="absent: there is no such run folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"other: not a run folder, it has no config\.json"):
        RunFolder.open(tmp_path / "other")


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, Progress(), 2) as metrics:
        for iteration in range(1, 5):
            metrics.append({"iteration": iteration, "loss": math.nan})
        metrics.append({"iteration": 2, "validation_loss": 1.0, "validation_loss_interval": 0.1})
        metrics.append({"iteration": 4, "validation_loss": 1.0, "validation_loss_interval": 0.1})
    with open(path, "a") as file:
        file.write('{"iteration": 5, "lo')
    with Metrics(path, Progress(iteration=4, validated=2), 2) as metrics:
        metrics.append({"iteration": 5, "loss": 0.5})
    records = read_metrics(path)
    training = [(r["iteration"], r["loss"]) for r in records if not is_validation(r)]
    assert training == [(n, None) for n in range(1, 5)] + [(5, 0.5)]
    assert [r["iteration"] for r in records if is_validation(r)] == [2]


def test_the_family_takes_the_runs_device(tmp_path):
    with pytest.raises(ValueError, match="device: 'cuda:99' is not available here"):
        build_family(Config(**GLYPHS, device="cuda:99"), "train", seed=0)
    with pytest.raises(ValueError, match="device: 'cuda:99' is not available here"):
        Trainer.start(Config(**GLYPHS, device="cuda:99"), tmp_path / "run")
    # Waves are drawn on the CPU whatever the device, and moved.
    assert build_family(Config(**WAVES, device="cuda:99"), "train", seed=0).sample(0, 1).support.x.device.type == "cpu"


def test_intervals():
    values = [0.2, 0.4, 0.9, 0.5]
    mean, half = mean_interval(values)
    deviation = math.sqrt(sum((v - 0.5) ** 2 for v in values) / 3)
    assert (mean, half) == (pytest.approx(0.5), pytest.approx(1.96 * deviation / 2))
    gap = paired_difference(values, [v - 0.1 for v in values])
    assert gap == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    with pytest.raises(ValueError, match="b: expected the scores of the same 4 tasks, got 3"):
        paired_difference(values, values[:3])
    with pytest.raises(ValueError, match="values: expected at least two scores"):
        mean_interval([1.0])


def test_evaluation_is_reproducible_and_blind_to_its_batch():
    config = Config(**GLYPHS)
    learner, family = build_learner(config), build_family(config, "test", seed=0)
    first = evaluate(learner, family, tasks=7, batch=7)
    second = evaluate(learner, family, tasks=7, batch=3, workers=2)
    assert first.digest == second.digest
    assert torch.equal(first.metrics, second.metrics)
    torch.testing.assert_close(first.losses, second.losses)
    assert evaluate(learner, build_family(config, "test", seed=1), tasks=7).digest != first.digest
    with pytest.raises(Cancelled):
        evaluate(learner, family, tasks=7, cancelled=lambda: True)
    with pytest.raises(TypeError, match=r"tasks: expected an int, got 2\.5"):
        evaluate(learner, family, tasks=2.5)
    with pytest.raises(ValueError, match="tasks: expected at least 2, got 1"):
        evaluate(learner, family, tasks=1)
    with pytest.raises(ValueError, match=f"tasks: expected at most {2**31 - 1}, got {2**70}"):
        evaluate(learner, family, tasks=2**70)


def test_dropout_is_off_while_scoring_and_batch_norms_stay_in_training():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.7), nn.Linear(8, 2)]
    modes = []
    layers[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    family = build_family(Config(**GLYPHS), "test", seed=0)
    with_dropout, without = (
        MAML(nn.Sequential(*each), lr=0.1, steps=2, route="loop") for each in (layers, layers[:4] + layers[5:])
    )
    assert torch.equal(evaluate(with_dropout, family, tasks=4).losses, evaluate(without, family, tasks=4).losses)
    assert all(modes)
    assert all(module.training for module in with_dropout.modules())


def test_the_digest_is_of_the_digests_of_the_tasks():
    config = Config(**GLYPHS)
    family = build_family(config, "test", seed=0)
    digest = hashlib.blake2b(digest_size=16)
    for index in range(5):
        task, own = family.sample(index, 1), hashlib.blake2b(digest_size=16)
        for tensor in (*task.support, *task.query):
            own.update(tensor.numpy())
        digest.update(own.digest())
    assert evaluate(build_learner(config), family, tasks=5, batch=3).digest == digest.hexdigest()


def test_evaluation_leaves_no_gradient_and_no_graph():
    config = Config(**WAVES)
    learner = build_learner(config)
    scores = evaluate(learner, build_family(config, "validation", seed=0), tasks=4)
    assert scores.metrics is None
    assert not scores.losses.requires_grad
    assert all(p.grad is None for p in learner.parameters())


def test_a_run_without_a_validation_has_no_best(tmp_path):
    run = Trainer.start(Config(**WAVES), tmp_path / "run").run
    with pytest.raises(ValueError, match=r"best\.pt: the run has not come to a validation yet"):
        load_learner(run, "best")
    with pytest.raises(ValueError, match="checkpoint: expected best or last, got 'first'"):
        load_learner(run, "first")
    _, learner, progress = load_learner(run, "last")
    assert progress == Progress(data=progress.data)
    assert_same(learner.state_dict(), build_learner(Config(**WAVES)).state_dict())


def test_one_picture_of_several_runs(tmp_path):
    runs = {}
    for name, options in {"MAML": {**GLYPHS, "update": "none"}, "KFO": GLYPHS}.items():
        trainer = Trainer.start(Config(**options), tmp_path / name)
        trainer.fit()
        runs[name] = trainer.run.metrics
    plot_runs(runs, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    plot_runs({"nothing yet": tmp_path / "absent.jsonl"}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")
