"""What the progress bar says about the time, and where it is shown."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import tqdm.auto
from tqdm import tqdm as text_bar

from kfo_ext.runs.bars import progress_bar
from kfo_ext.trainer import Config, Trainer, loop


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Trains within a time budget and returns all that the bar said."""
    text = io.StringIO()

    def bar(*args, shown, **options):
        assert shown
        return text_bar(*args, **{**options, "disable": False, "file": text, "mininterval": 0.0, "ncols": 120})

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


def loop_of(shown: bool) -> str:
    return f"from kfo_ext.runs.bars import progress_bar\nfor _ in progress_bar(range(3), shown={shown}): pass\n"


@pytest.mark.parametrize("shown", [True, False])
def test_a_plain_terminal_gets_text_and_no_warning(shown):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    line = [sys.executable, "-W", "error", "-c", loop_of(shown)]
    done = subprocess.run(line, stderr=theirs, stdout=subprocess.PIPE, check=True, timeout=60)
    os.write(theirs, b"end")
    said = os.read(ours, 10000).decode()
    os.close(ours)
    os.close(theirs)
    assert ("3/3 [" in said) == shown
    assert "Warning" not in said
    assert done.stdout == b""


def test_what_is_no_terminal_gets_nothing():
    line = [sys.executable, "-W", "error", "-c", loop_of(True)]
    done = subprocess.run(line, capture_output=True, check=True, timeout=60)
    assert done.stdout + done.stderr == b""


@pytest.mark.parametrize("shown", [True, False])
def test_a_notebook_gets_its_widget(shown, monkeypatch):
    """Though its output is no terminal, where tqdm alone would show nothing."""
    given = []

    class Widget(text_bar):
        __module__ = "tqdm.notebook"

        def __init__(self, *args, **options) -> None:
            given.append(options)
            super().__init__(*args, **{**options, "disable": True})

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    assert list(progress_bar(range(3), shown=shown)) == [0, 1, 2]
    assert given == [{"disable": not shown}]
