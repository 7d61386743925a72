"""Training options: schedules, rates, optimizers, accumulation and early stopping of whole runs, resumed exactly."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from states import WAVES, assert_same
from torch.optim import lr_scheduler

from kfo_ext.runs import checkpoint
from kfo_ext.runs.metrics import is_validation, read_metrics
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.trainer import Config, Trainer, loop
from kfo_ext.trainer.optimizers import OPTIMIZERS
from kfo_ext.trainer.recipe import build_learner, build_optimizer
from kfo_ext.trainer.schedules import SCHEDULES, meta_rate

OPTIMIZER_OPTIONS = {
    "adam": [{}, {"weight_decay": 0.1}],
    "adamw": [{}],
    "sgd": [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
}
SCHEDULE_OPTIONS = {
    "constant": {},
    "half_life": {"meta_lr_half_life": 2},
    "cosine": {"meta_lr_iterations": 3, "meta_lr_end": 0.0005},
    "step": {"meta_lr_every": 2, "meta_lr_factor": 0.3},
}
CHOICES = [({"optimizer": name, **options}) for name, rows in OPTIMIZER_OPTIONS.items() for options in rows]


def test_the_choices_are_those_that_there_are():
    assert list(OPTIMIZER_OPTIONS) == list(OPTIMIZERS)
    assert list(SCHEDULE_OPTIONS) == list(SCHEDULES)


def state_of(trainer: Trainer) -> dict:
    return {
        "learner": trainer.learner.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": {**vars(trainer.progress), "elapsed": None},
        "metrics": [{**record, "elapsed": None} for record in read_metrics(trainer.run.metrics)],
    }


@pytest.mark.parametrize("schedule", SCHEDULE_OPTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", CHOICES, ids=lambda options: "-".join(map(str, options.values())))
def test_resume_is_bit_exact(optimizer, schedule, accumulate, tmp_path):
    given = {**WAVES, "schedule": schedule, **SCHEDULE_OPTIONS[schedule], **optimizer, "accumulate": accumulate}
    given |= {"meta_lr_warmup": 2, "meta_lr_update": 0.01, "iterations": 5, "clip_norm": 1.0}
    whole = Trainer.start(Config(**given), tmp_path / "whole")
    start = [p.detach().clone() for p in whole.learner.parameters()]
    whole.fit()
    assert all(not torch.equal(a, b) for a, b in zip(start, whole.learner.parameters()))
    expected = state_of(whole)
    Trainer.start(Config(**{**given, "iterations": 2}), tmp_path / "parts").fit()
    second = Trainer.resume(tmp_path / "parts", iterations=5)
    second.fit()
    assert_same(state_of(second), expected)
    assert not second.optimizer.state or checkpoint.load(second.run.last)["optimizer"]["state"]


def rates_of(config: Config) -> list[float]:
    return [meta_rate(config.schedule_row, n, config.values) for n in range(config.iterations)]


# Options, and the scheduler of torch that gives the same rates.
SCHEDULERS = {
    "constant": ({"schedule": "constant"}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "half_life": (
        {"schedule": "half_life", "meta_lr_half_life": 3},
        lambda o: lr_scheduler.ExponentialLR(o, 0.5 ** (1 / 3)),
    ),
    "cosine": ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, 12)),
    "cosine-end": (
        {"schedule": "cosine", "meta_lr_iterations": 20, "meta_lr_end": 0.001},
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.001),
    ),
    "step": (
        {"schedule": "step", "meta_lr_every": 4, "meta_lr_factor": 0.3},
        lambda o: lr_scheduler.StepLR(o, 4, gamma=0.3),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_rates_are_those_of_torchs_schedulers(name, warmup):
    options, scheduler_of = SCHEDULERS[name]
    config = Config(**options, meta_lr=0.02, meta_lr_warmup=warmup, iterations=12 + warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    scheduler = scheduler_of(optimizer)
    if warmup:
        rising = lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=max(warmup - 1, 1))
        scheduler = lr_scheduler.SequentialLR(optimizer, [rising, scheduler], [warmup])
    expected = []
    for _ in range(config.iterations):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates_of(config) == pytest.approx(expected, rel=1e-9)
    assert rates_of(config)[warmup] == 0.02


def test_a_cosine_stays_at_its_end():
    config = Config(schedule="cosine", meta_lr=0.02, meta_lr_iterations=3, meta_lr_end=0.001, iterations=6)
    assert rates_of(config)[3:] == pytest.approx([0.001] * 3)


def test_a_cosine_is_as_long_as_the_run_was_when_it_began(tmp_path):
    config = Config(**WAVES, schedule="cosine", meta_lr_warmup=1)
    assert config.meta_lr_iterations == WAVES["iterations"] - 1
    Trainer.start(config, tmp_path / "run").fit()
    message = "iterations: expected at most 4, where the outer rate comes to 0, got 6: give a larger meta_lr_iterations"
    with pytest.raises(ValueError, match=message):
        Trainer.resume(tmp_path / "run", iterations=6)
    Trainer.start(config.changed(meta_lr_end=0.001), tmp_path / "other").fit()
    again = Trainer.resume(tmp_path / "other", iterations=6)
    assert again.config.meta_lr_iterations == 3
    again.fit()
    rates = [r["learning_rate"] for r in read_metrics(again.run.metrics) if not is_validation(r)]
    assert rates[4:] == pytest.approx([0.001] * 2)


BAD = [
    ({"schedule": "half_life"}, "meta_lr_half_life: schedule 'half_life' needs the meta-iterations in which the outer"),
    ({"schedule": "step"}, "meta_lr_every: schedule 'step' needs the meta-iterations between two changes of the outer"),
    ({"schedule": "cosine", "meta_lr_warmup": 1000}, "meta_lr_iterations: expected at least 1, got 0"),
    ({"schedule": "linear"}, f"schedule: expected one of {', '.join(SCHEDULES)}, got 'linear'"),
    ({"optimizer": "lion"}, f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got 'lion'"),
    ({"optimizer": "sgd", "nesterov": True}, "nesterov: expected a momentum above 0 with it, got momentum 0"),
    ({"optimizer": "sgd", "momentum": -0.5}, "momentum: expected a finite number of at least 0, got -0.5"),
    ({"weight_decay": -1.0}, "weight_decay: expected a finite number of at least 0, got -1.0"),
    ({"weight_decay": math.inf}, "weight_decay: expected a finite number of at least 0, got inf"),
    ({"meta_lr_update": 0.0}, "meta_lr_update: expected a finite number above 0, got 0.0"),
    ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError) as caught:
        Config(**options)
    assert str(caught.value).startswith(message)


def test_a_rate_of_an_update_without_meta_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="meta_lr_update: has no effect with update 'none', which has no meta-param"):
        Trainer.start(Config(**WAVES, update="none", meta_lr_update=0.1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = Config(**WAVES, update="none", per_step=True, meta_lr_update=0.1)
    assert len(build_optimizer(config, build_learner(config)).param_groups) == 2


@pytest.mark.parametrize("ratio", [0.1, 5.0], ids=["slower", "faster"])
def test_the_update_has_a_rate_of_its_own(ratio, tmp_path):
    """Of SGD's first step, which is rate times meta-gradient."""
    given = {**WAVES, "optimizer": "sgd", "dtype": "float64", "iterations": 1, "meta_lr": 0.003}
    trainer = Trainer.start(Config(**given, meta_lr_update=0.003 * ratio), tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.learner.named_parameters()}
    trainer.fit()
    for name, p in trainer.learner.named_parameters():
        rate = 0.003 * (ratio if name.startswith("update.") else 1.0)
        torch.testing.assert_close(before[name] - p.detach(), rate * p.grad, rtol=1e-9, atol=1e-15)
    assert read_metrics(trainer.run.metrics)[0]["learning_rate"] == 0.003


def test_an_iteration_accumulates_the_next_meta_batches(tmp_path):
    given = {**WAVES, "dtype": "float64", "iterations": 3, "validation_every": 3}
    parts = Trainer.start(Config(**given, accumulate=2), tmp_path / "parts")
    whole = Trainer.start(Config(**{**given, "meta_batch": 4}), tmp_path / "whole")

    class Joined:
        """Meta-batches 2 n and 2 n + 1 of the other run as one."""

        def sample(self, index: int, tasks: int) -> TaskBatch:
            pair = [parts.tasks.sample(2 * index + half, tasks // 2) for half in (0, 1)]
            return TaskBatch(*(Examples(*map(torch.cat, zip(*part))) for part in zip(*pair)))

    whole.tasks = Joined()
    for trainer in (parts, whole):
        trainer.fit()
    for p, q in zip(parts.learner.parameters(), whole.learner.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    for ours, theirs in itertools.islice(zip(*(read_metrics(t.run.metrics) for t in (parts, whole))), 3):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)


def test_a_run_that_ended_by_patience_goes_on_with_more(tmp_path):
    given = {**WAVES, "validation_every": 1, "iterations": 50, "meta_lr": 1e-30}
    expected = Trainer.start(Config(**given, patience=4), tmp_path / "whole").fit().progress
    assert Trainer.start(Config(**given, patience=2), tmp_path / "parts").fit().reason == "patience"
    assert Trainer.resume(tmp_path / "parts").fit().progress.iteration == expected.iteration - 2
    outcome = Trainer.resume(tmp_path / "parts", patience=4).fit()
    assert (outcome.reason, outcome.progress.stale) == ("patience", 4)
    assert outcome.progress.iteration == expected.iteration


def test_a_validation_at_the_end_of_a_time_budget_does_not_try_the_patience(tmp_path, monkeypatch):
    given = {**WAVES, "validation_every": 4, "iterations": 50, "meta_lr": 1e-30, "patience": 1}
    trainer = Trainer.start(Config(**given), tmp_path / "run")
    # A clock by which an iteration takes a second.
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(trainer.progress.iteration)))
    assert trainer.fit(time_budget=5).reason == "time budget"
    assert (trainer.progress.validated, trainer.progress.stale) == (5, 0)
    assert trainer.fit(time_budget=100).reason == "patience"
    assert trainer.progress.iteration == 8
