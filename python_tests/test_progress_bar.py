"""What the progress bar says about the time, and where it is shown."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import tqdm.auto
from tqdm import tqdm as text_bar

from kfo_ext.runs import bars
from kfo_ext.runs.bars import progress_bar
from kfo_ext.trainer import Config, Trainer


@pytest.fixture
def said(monkeypatch):
    """All that the bars of training have said."""
    text = io.StringIO()

    def bar(*args, shown, **options):
        assert shown
        return text_bar(*args, **{**options, "disable": False, "file": text, "mininterval": 0.0, "ncols": 120})

    monkeypatch.setattr(bars, "progress_bar", bar)
    return text.getvalue


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: its one element is the time."""
    now = [1000.0]
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_training_shows_loss_and_time_left_until_its_last_iteration(said, tmp_path):
    config = Config(dataset="sinusoid", hidden=4, steps=1, meta_batch=2, iterations=5, validation_tasks=2)
    Trainer.start(config, tmp_path / "run").fit()
    # Without what tqdm thinks is left, and to the end.
    assert re.search(r"5/5 \[\d\d:\d\d, [^<]*it/s?, loss=\d+\.\d+, left=00:00\]", said())
    assert "validating: " in said()


# Iterations after 10 s of 100, seconds of the budget, and what is left.
LEFT = {
    "iterations": (5, math.inf, "03:10"),
    "budget": (5, 40.0, "00:30"),
    "iterations-before-the-budget": (50, 1000.0, "00:10"),
    "budget-is-over": (5, 4.0, "00:00"),
    "all-done": (100, math.inf, "00:00"),
}


@pytest.mark.parametrize("case", LEFT)
def test_time_left_is_that_of_what_ends_first(case, clock, said):
    iterations, budget, left = LEFT[case]
    with bars.TrainingBar(107, 7, deadline=1000.0 + budget) as bar:
        for _ in range(iterations - 1):
            bar.show({"loss": 1.0})
        clock[0] += 10.0
        bar.show({"iteration": 7 + iterations, "loss": 2.0, "accuracy": 0.5})
        assert bar.left() >= 0.0
    assert said().rstrip().endswith(f"loss=2.000, accuracy=0.500, left={left}]"), said()[-200:]


def test_more_iterations_than_were_asked_for_leave_no_time(clock, said):
    """As of a run that is resumed with fewer of them."""
    with bars.TrainingBar(3, 2) as bar:
        clock[0] += 1.0
        bar.show({"loss": 1.0})
        bar.show({"loss": 1.0})
        assert bar.left() == 0.0


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


KERNEL = """
import sys, types
sys.modules["ipywidgets"] = None
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
"""


@pytest.mark.parametrize("shown", [True, False])
def test_a_notebook_without_ipywidgets_gets_text_and_no_warning(shown):
    """Though its output is no terminal, where tqdm alone shows nothing."""
    line = [sys.executable, "-W", "always", "-c", KERNEL + loop_of(shown)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    assert ("3/3 [" in done.stderr) == shown
    assert "Warning" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("shown", [True, False])
def test_a_notebook_gets_its_widget(shown, monkeypatch):
    given = []

    class Widget(text_bar):
        def __init__(self, *args, **options) -> None:
            given.append(options)
            super().__init__(*args, **{**options, "disable": True})

    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    assert list(progress_bar(range(3), shown=shown)) == [0, 1, 2]
    assert given == [{"disable": not shown}]
