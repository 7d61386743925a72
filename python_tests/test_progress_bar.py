"""What the progress bar says about the time."""

from __future__ import annotations

import io
import re

import pytest
from tqdm import tqdm

from kfo_ext.trainer import Config, Trainer, loop


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Trains within a time budget and returns all that the bar said."""
    text = io.StringIO()

    def bar(*args, **options):
        return tqdm(*args, **{**options, "disable": False, "file": text, "mininterval": 0.0, "ncols": 120})

    def run(iterations: int, time_budget: float) -> str:
        config = Config(dataset="sinusoid", hidden=4, steps=1, meta_batch=2, iterations=iterations, validation_tasks=2)
        trainer = Trainer.start(config, tmp_path / "run")
        monkeypatch.setattr(loop, "progress_bar", bar)
        trainer.fit(time_budget=time_budget)
        return text.getvalue()

    return run


def test_without_a_budget_the_time_left_is_that_of_all_iterations(fit):
    said = fit(5, 0.0)
    assert "5/5 [00:0" in said
    assert re.search(r"\[\d\d:\d\d<", said)
    assert "seconds left" not in said


def test_with_a_budget_it_is_that_of_the_budget(fit):
    said = fit(10**6, 0.3)
    assert "seconds left=" in said
    assert not re.search(r"\[\d\d:\d\d<", said)
    assert re.search(r"/1000000 \[00:00, +[\d.?]+(it/s|s/it)", said)


def test_after_a_late_last_iteration_no_time_is_left(fit, monkeypatch):
    step = Trainer._step

    def late(trainer, *args):
        step(trainer, *args)
        trainer._deadline -= 100.0
        step(trainer, *args)

    monkeypatch.setattr(Trainer, "_step", late)
    said = fit(10**6, 50.0)
    assert "seconds left=0" in said
    assert "seconds left=-" not in said
