"""Signals that ask a training to stop: alone, together, during each other's handling, ignored, and outside training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import permutations

import pytest
from deadlines import seconds

from kfo_ext import demo
from kfo_ext.trainer import signals
from kfo_ext.trainer.signals import SIGNALS, interrupt_ends, stop_requested


class Abort(Exception):
    """What the handler that was there before raises."""


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that raise in place of those that end the process."""

    def abort(number, frame):
        raise Abort(signal.Signals(number).name)

    before = {number: signal.signal(number, abort) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_is_a_wish(number, capfd):
    with stop_requested() as stop:
        assert not stop()
        send(number)
        assert stop()
    assert capfd.readouterr().err.startswith(f"{number.name}: stopping after this iteration and saving; once more")
    with pytest.raises(Abort):
        send(number)


@pytest.mark.parametrize(
    "pair", list(permutations(SIGNALS, 2)), ids=lambda pair: "-".join(number.name for number in pair)
)
def test_signals_together_are_one_wish(pair, capfd):
    with stop_requested() as stop:
        for number in (*pair, *pair):
            send(number)
        assert stop()
    assert capfd.readouterr().err.count("stopping after") == 1


def test_signals_during_the_handling_of_one(monkeypatch):
    said = []

    def say(line):
        said.append(line)
        for number in SIGNALS:
            send(number)

    monkeypatch.setattr(signals, "_say", say)
    with stop_requested() as stop:
        send(signal.SIGTERM)
        assert stop()
    assert len(said) == 1


def test_a_signal_in_the_middle_of_a_write_to_standard_error():
    code = """
import io, os, signal, sys
from kfo_ext.trainer.signals import stop_requested

class Interrupted(io.RawIOBase):
    def writable(self):
        return True
    def write(self, data):
        os.kill(os.getpid(), signal.SIGTERM)
        return len(data)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Interrupted()))
with stop_requested() as stop:
    print("a progress bar", file=sys.stderr, flush=True)
    # Not at the end: there the stream would be flushed once more.
    os._exit(0 if stop() else 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(60))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("SIGTERM: stopping")


def test_a_later_signal_aborts(monkeypatch):
    monkeypatch.setattr(signals, "TOGETHER", 0.05)
    for number in SIGNALS:
        with stop_requested() as stop:
            send(signal.SIGTERM)
            time.sleep(0.06)
            with pytest.raises(Abort, match=number.name):
                send(number)
            assert stop()


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requested() as stop:
        send(signal.SIGHUP)
        assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        send(signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_standard_error_does_not_matter(monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    with stop_requested() as stop:
        send(signal.SIGHUP)
        assert stop()


def test_an_import_leaves_the_handler_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    with interrupt_ends(), pytest.raises(Abort):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupt_ends():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_demo_that_is_stopped_stops_its_trainings(monkeypatch, tmp_path):
    sent = []

    class Process:
        """A training that ends when it is asked to."""

        returncode = None

        def __init__(self, *args, **options):
            pass

        def poll(self):
            # Once it runs.
            if not sent:
                send(signal.SIGHUP)
            sent.append("poll")
            return self.returncode

        def terminate(self):
            sent.append("terminate")
            self.returncode = 0

        def wait(self):
            return self.returncode

    monkeypatch.setattr(demo.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        demo._side_by_side(tmp_path, {"none": [], "kfo": []}, 10.0)
    assert sent.count("terminate") == 2
