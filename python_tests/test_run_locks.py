"""Run folders: one writer at a time, names of their own, and readers that change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace

import pytest
from deadlines import seconds
from states import WAVES

from kfo_ext.runs import RunFolder, checkpoint, run_folder
from kfo_ext.runs.files import new_folder
from kfo_ext.trainer import Config, Trainer, compare_runs, evaluate_run

LOCKED = "run: another process or trainer is writing this run"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    first = Trainer.start(Config(**WAVES), tmp_path / "run")
    other = Trainer.resume(tmp_path / "run")
    before = contents(tmp_path / "run")
    with first.run.writing():
        with pytest.raises(ValueError, match=LOCKED):
            Trainer.resume(tmp_path / "run", iterations=9)
        with pytest.raises(ValueError, match=LOCKED):
            other.fit()
        with pytest.raises(ValueError, match=LOCKED), first.run.writing():
            pass
    assert contents(tmp_path / "run") == before
    assert other.fit().reason == "finished"


def test_a_start_does_not_take_a_folder_that_another_start_has_locked(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with run.writing(), pytest.raises(ValueError, match=LOCKED):
        Trainer.start(Config(**WAVES), run.path)
    assert set(contents(run.path)) == {".lock"}
    assert Trainer.start(Config(**WAVES), run.path).fit().reason == "finished"


def test_of_many_starts_in_one_folder_one_wins(tmp_path):
    def start(seed: int) -> Trainer | ValueError:
        try:
            return Trainer.start(Config(**WAVES, seed=seed), tmp_path / "run")
        except ValueError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(start, range(8)))
    (winner,) = [result for result in results if isinstance(result, Trainer)]
    messages = [str(result) for result in results if not isinstance(result, Trainer)]
    assert all("already holds a run" in text or "is writing this run" in text for text in messages)
    assert Config.load(winner.run.config) == winner.config
    assert checkpoint.load(winner.run.last)["config"] == winner.config.to_dict()
    assert winner.fit().reason == "finished"


def test_a_trainer_does_not_overwrite_what_another_one_did_since(tmp_path):
    stale = Trainer.start(Config(**WAVES), tmp_path / "run")
    Trainer.resume(tmp_path / "run").fit()
    after = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"last\.pt: another trainer has written it since; go on with Trainer\.resume"):
        stale.fit()
    assert contents(tmp_path / "run") == after
    fresh = Trainer.resume(tmp_path / "run", iterations=6)
    assert fresh.fit().progress.iteration == 6
    # The same trainer may go on.
    assert fresh.fit().progress.iteration == 6


def test_an_error_releases_the_lock(tmp_path, monkeypatch):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    monkeypatch.setattr(trainer, "_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert Trainer.resume(tmp_path / "run").fit().reason == "finished"


def test_default_folders_are_each_run_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noon = SimpleNamespace(now=lambda *_: datetime(2024, 5, 6, 12))
    monkeypatch.setattr(run_folder, "datetime", noon)
    runs = [Trainer.start(Config(**WAVES)).run for _ in range(3)]
    base = "runs/sinusoid-maml-kfo-20240506-120000"
    assert [str(run.path) for run in runs] == [base, f"{base}-2", f"{base}-3"]
    with pytest.raises(ValueError, match="device: 'cuda:99' is not available here"):
        Trainer.start(Config(**WAVES, device="cuda:99"))
    assert len(os.listdir("runs")) == 3, "what cannot start leaves no folder"


def test_new_folders_are_unique_among_threads(tmp_path):
    barrier = threading.Barrier(8)

    def make(_) -> str:
        barrier.wait()
        return new_folder(tmp_path / "deep" / "run").name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(make, range(8)))
    assert sorted(names) == sorted(["run", *(f"run-{number}" for number in range(2, 9))])
    assert sorted(os.listdir(tmp_path / "deep")) == sorted(names)


def test_readers_delete_nothing_and_a_resume_only_its_own(tmp_path):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.fit()
    token = "0123456789abcdef"
    foreign = {".notes.partial", f".thesis.tex.{token}.partial", f".eval-test-best.json.{token}.partial"}
    own = {f".last.pt.{token}.partial", f".metrics.jsonl.{token}.partial", f".curve.png.{token}.partial"}
    for name in foreign | own:
        (trainer.run.path / name).write_text("half")

    def left() -> set[str]:
        return {name for name in os.listdir(trainer.run.path) if name.endswith(".partial")}

    run = RunFolder.open(trainer.run.path)
    evaluate_run(run, tasks=3)
    compare_runs(run, run)
    assert left() == foreign | own
    Trainer.resume(run.path)
    assert left() == foreign
    folder = tmp_path / "no run"
    folder.mkdir()
    (folder / ".last.pt.partial").write_text("mine")
    with pytest.raises(ValueError, match="no run: not a run folder"):
        RunFolder.open(folder)
    with pytest.raises(ValueError, match="no run: expected an absent or empty folder"):
        Trainer.start(Config(**WAVES), folder)
    assert os.listdir(folder) == [".last.pt.partial"]


TRAINING = """
import sys
from kfo_ext.trainer import Config, Trainer
Trainer.start(Config(**eval(sys.argv[2])), sys.argv[1]).fit()
"""


def test_a_run_in_training_is_read_not_disturbed_and_free_after_a_kill(tmp_path):
    run = RunFolder(tmp_path / "run")
    options = {**WAVES, "iterations": 10**9, "validation_every": 1}
    with subprocess.Popen([sys.executable, "-c", TRAINING, str(run.path), repr(options)]) as process:
        try:
            deadline = time.monotonic() + seconds(60)
            while not run.best.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            # Readers side by side, each of a run whose trainer replaces its files all the time.
            with ThreadPoolExecutor(4) as pool:
                scores = list(pool.map(lambda seed: evaluate_run(run, tasks=2, seed=seed), range(12)))
            compare_runs(run, run)
            with pytest.raises(ValueError, match=LOCKED):
                Trainer.resume(run.path)
            assert process.poll() is None, "the training goes on"
        finally:
            process.send_signal(signal.SIGKILL)
    assert all(score.iteration > 0 for score in scores)
    done = checkpoint.load(run.last)["progress"]["iteration"]
    assert Trainer.resume(run.path, iterations=done + 2).fit().progress.iteration == done + 2
