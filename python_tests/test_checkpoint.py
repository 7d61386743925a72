"""Checkpoints: whole after any kill, safe to load, and refused with a reason when they do not fit."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import random
import re
import subprocess
import sys

import pytest
import torch
from deadlines import seconds

from kfo_ext.runs import checkpoint
from kfo_ext.runs.files import atomic_write
from kfo_ext.trainer import Config, Trainer, load_learner

OPTIONS = {
    "dataset": "sinusoid",
    "inner_lr": 0.01,
    "hidden": 4,
    "steps": 1,
    "meta_batch": 2,
    "iterations": 2,
    "validation_every": 1,
    "validation_tasks": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bytes of a finished run's last checkpoint."""
    trainer = Trainer.start(Config(**OPTIONS), tmp_path_factory.mktemp("trained") / "run")
    trainer.fit()
    return trainer.run.last.read_bytes()


@pytest.fixture
def run(trained, tmp_path):
    """A fresh run folder that holds this checkpoint."""
    folder = Trainer.start(Config(**OPTIONS), tmp_path / "run").run
    folder.last.write_bytes(trained)
    return folder


def refused(run, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(run.last)) + f": {reason}") as caught:
        Trainer.resume(run.path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(str(run.last))):
        load_learner(run, "last")


# Forks a process that saves without end, kills it while its partial file is there, loads, and so on.
KILLER = """
import os, signal, sys, time, torch
from pathlib import Path
from kfo_ext.runs import checkpoint
from kfo_ext.runs.files import partials

folder, kills, inside = Path(sys.argv[1]), 12, 0
path = folder / "last.pt"

def save(number):
    learner = {"w": torch.full((500_000,), float(number))}
    plain = {"config": {}, "optimizer": {}, "rng": {}, "progress": {"iteration": number}}
    checkpoint.save(path, {**plain, "learner": learner})

torch.set_num_threads(1)
save(0)
for attempt in range(kills):
    first = checkpoint.load(path)["progress"]["iteration"]
    pid = os.fork()
    if pid == 0:
        while True:
            first += 1
            save(first)
    deadline = time.monotonic() + 5
    while not list(folder.glob(".*")) and time.monotonic() < deadline:
        pass
    time.sleep(0.003 * (attempt % 4))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    state = checkpoint.load(path)
    assert torch.equal(state["learner"]["w"], torch.full((500_000,), float(state["progress"]["iteration"])))
    inside += len(list(folder.iterdir())) > 1
    for partial in partials([path]):
        partial.unlink()
    assert os.listdir(folder) == ["last.pt"]
print(inside)
"""


def test_kill_while_saving_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(120))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill fell into a save: the test has shown nothing"


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_write(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("disk on fire")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def wrapped(payload: bytes) -> bytes:
    """A payload in the container of a checkpoint, as its docstring has it."""
    digest = hashlib.sha256(payload).hexdigest()
    return f"kfo_ext checkpoint {checkpoint.VERSION} {digest} {len(payload)}\n".encode() + payload


def zipped(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("dump", [zipped, pickle.dumps], ids=["zip", "pickle"])
@pytest.mark.parametrize("wrap", [bytes, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize("bypass", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_bomb_does_not_go_off(dump, wrap, bypass, run, monkeypatch):
    if bypass:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(run.path)
    run.last.write_bytes(wrap(dump(Bomb())))
    refused(run, "not a checkpoint")
    assert not (run.path / "exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, run, trained):
    run.last.write_bytes(trained[: int(share * len(trained))])
    refused(run, "the checkpoint is truncated or damaged" if share else "not a checkpoint of kfo_ext")


def test_every_flipped_bit_is_refused(run, trained):
    first = 8 * (trained.index(b"\n") + 1)
    others = random.Random(0).sample(range(first, 8 * len(trained)), 400)
    for bit in (*range(first), *others):
        damaged = bytearray(trained)
        damaged[bit // 8] ^= 1 << bit % 8
        run.last.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{run.last}: ")) as caught:
            checkpoint.load(run.last)
        assert "\n" not in str(caught.value)


def test_a_flipped_directory_bit_is_refused(run, trained):
    """The bit of a zip entry that makes it a folder: torch then leaves the tensor's memory as it is."""
    entries = [match.start() for match in re.finditer(rb"PK\x01\x02", trained)]
    for entry in entries:
        damaged = bytearray(trained)
        # External attributes lie 38 bytes into an entry of the central directory; 0x10 says folder.
        damaged[entry + 38] ^= 0x10
        run.last.write_bytes(damaged)
        refused(run, "the checkpoint is damaged")
    assert len(entries) > 5


def test_a_file_that_went_on_is_refused(run, trained):
    run.last.write_bytes(trained + b"\0")
    refused(run, "the checkpoint is truncated or damaged")


def test_an_absent_file_is_refused(run):
    run.last.unlink()
    # A folder with a configuration alone is an unfinished start, which can be resumed.
    run.metrics.touch()
    refused(run, "there is no such checkpoint")


def test_a_foreign_file_is_refused(run):
    torch.save({"state_dict": {}}, run.last)
    refused(run, "not a checkpoint of kfo_ext")
    run.last.write_bytes(wrapped(zipped([1, 2])))
    refused(run, "the checkpoint has no valid section 'config'")
    run.last.write_bytes(wrapped(b"meow"))
    refused(run, "not a checkpoint of plain tensors and numbers")
    run.last.unlink()
    run.last.mkdir()
    refused(run, "not a readable checkpoint")


def test_another_version_is_refused(run, trained):
    run.last.write_bytes(trained.replace(b"checkpoint %d " % checkpoint.VERSION, b"checkpoint 99 ", 1))
    refused(run, f"checkpoint version '99', this kfo_ext reads {checkpoint.VERSION}")


def edited(run, edit) -> None:
    state = checkpoint.load(run.last)
    edit(state)
    run.last.write_bytes(wrapped(zipped(state)))


def drop_a_parameter(state):
    del state["learner"]["update.layers.0.R"]


def move_a_parameter(state):
    state["learner"]["model.9.weight"] = torch.zeros(1)


def reshape_a_parameter(state):
    state["learner"]["model.body.0.weight"] = torch.zeros(3, 1)


def change_a_dtype(state):
    state["learner"]["model.body.0.weight"] = state["learner"]["model.body.0.weight"].double()


def reshape_a_moment(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def drop_a_moment(state):
    state["optimizer"]["state"][0].pop("exp_avg_sq")


EDITS = {
    "section": (lambda s: s.pop("learner"), "the checkpoint has no valid section 'learner'"),
    "config": (
        lambda s: s["config"].update(hidden=8),
        r"the checkpoint is of another configuration \(hidden: expected 4, got 8\)",
    ),
    "config-key": (lambda s: s["config"].update(temperature=1), "unknown configuration key 'temperature'"),
    "config-keys": (lambda s: s["config"].update({7: 1}), "unknown configuration key 7"),
    "missing": (drop_a_parameter, r"the checkpoint lacks parameter 'update\.layers\.0\.R'"),
    "foreign-key": (lambda s: s["learner"].update({7: 1}), "the checkpoint has a foreign parameter 7"),
    "foreign": (move_a_parameter, r"the checkpoint has a foreign parameter 'model\.9\.weight'"),
    "shape": (reshape_a_parameter, r"model\.body\.0\.weight: expected \(4, 1\) .*, got \(3, 1\) torch\.float32"),
    "dtype": (change_a_dtype, r"model\.body\.0\.weight: expected \(4, 1\) torch\.float32, got \(4, 1\) torch\.float64"),
}
RESUME_EDITS = {
    "progress": (lambda s: s["progress"].update(iteration="2"), "the checkpoint's progress is not valid"),
    "progress-bool": (lambda s: s["progress"].update(stale=True), "the checkpoint's progress is not valid"),
    "progress-negative": (lambda s: s["progress"].update(iteration=-1), "the checkpoint's progress is not valid"),
    "progress-order": (lambda s: s["progress"].update(validated=3), "the checkpoint's progress is not valid"),
    "progress-nan": (lambda s: s["progress"].update(best_score=math.nan), "the checkpoint's progress is not valid"),
    "progress-key": (lambda s: s["progress"].pop("stale"), "the checkpoint's progress is not valid"),
    "rng": (lambda s: s["rng"].update(cpu=torch.zeros(3)), "the checkpoint's random state is not valid"),
    "groups": (lambda s: s["optimizer"]["param_groups"].clear(), "the optimizer state does not fit"),
    "moment": (
        reshape_a_moment,
        r"exp_avg of parameter 0: expected \(4, 1\) torch\.float32, got \(3,\) torch\.float32",
    ),
    "step": (
        lambda s: s["optimizer"]["state"][0].update(step=torch.zeros(3)),
        r"step of parameter 0: expected \(\) torch\.float32, got \(3,\) torch\.float32",
    ),
    "no-moment": (drop_a_moment, "exp_avg_sq of parameter 0: expected a tensor, got NoneType"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_checkpoint_that_does_not_fit_is_refused(name, run):
    edit, reason = EDITS[name]
    edited(run, edit)
    refused(run, reason)


@pytest.mark.parametrize("name", RESUME_EDITS)
def test_a_training_state_that_does_not_fit_is_refused(name, run):
    edit, reason = RESUME_EDITS[name]
    edited(run, edit)
    with pytest.raises(ValueError, match=re.escape(str(run.last)) + f": {reason}"):
        Trainer.resume(run.path)


def test_the_unedited_checkpoint_is_taken(run):
    edited(run, lambda state: None)
    assert Trainer.resume(run.path).progress.iteration == 2
