"""Checkpoints: whole after any kill, safe to load, and refused with a reason when they do not fit."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from deadlines import seconds

from kfo_ext.trainer import Config, Trainer, load_learner
from kfo_ext.trainer.files import atomic_write

OPTIONS = {
    "dataset": "sinusoid",
    "fast_lr": 0.01,
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
from kfo_ext.trainer import checkpoint
from kfo_ext.trainer.files import remove_partial

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
    remove_partial(folder)
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


@pytest.mark.parametrize(
    "save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))], ids=["zip", "pickle"]
)
@pytest.mark.parametrize("bypass", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_bomb_does_not_go_off(save, bypass, run, monkeypatch):
    if bypass:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(run.path)
    save(Bomb(), run.last)
    refused(run, "not a checkpoint")
    assert not (run.path / "exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, run, trained):
    run.last.write_bytes(trained[: int(share * len(trained))])
    refused(run, "not a checkpoint, or a truncated one")


def test_a_flipped_bit_is_refused(run, trained):
    with zipfile.ZipFile(run.last) as archive:
        member = max(
            (info for info in archive.infolist() if "/data/" in info.filename), key=lambda info: info.file_size
        )
        content = archive.read(member)
    position = trained.index(content) + len(content) // 2
    damaged = bytearray(trained)
    damaged[position] ^= 1
    run.last.write_bytes(damaged)
    refused(run, rf"the checkpoint is damaged \(checksum of {re.escape(member.filename)}\)")


def test_an_absent_file_is_refused(run):
    run.last.unlink()
    refused(run, "there is no such checkpoint")


def test_a_foreign_file_is_refused(run):
    torch.save({"state_dict": {}}, run.last)
    refused(run, "not a checkpoint of kfo_ext")
    torch.save([1, 2], run.last)
    refused(run, "not a checkpoint of kfo_ext")
    with zipfile.ZipFile(run.last, "w") as archive:
        archive.writestr("cat.txt", "meow")
    refused(run, "not a checkpoint of plain tensors and numbers")


def edited(run, edit) -> None:
    state = torch.load(run.last, weights_only=True)
    edit(state)
    torch.save(state, run.last)


def drop_a_parameter(state):
    del state["learner"]["update.layers.0.R"]


def move_a_parameter(state):
    state["learner"]["model.9.weight"] = torch.zeros(1)


def reshape_a_parameter(state):
    state["learner"]["model.0.weight"] = torch.zeros(3, 1)


def change_a_dtype(state):
    state["learner"]["model.0.weight"] = state["learner"]["model.0.weight"].double()


def reshape_a_moment(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def drop_a_moment(state):
    state["optimizer"]["state"][0].pop("exp_avg_sq")


EDITS = {
    "version": (lambda s: s.update(version=99), r"checkpoint version 99, this kfo_ext reads 1"),
    "section": (lambda s: s.pop("learner"), "the checkpoint has no valid section 'learner'"),
    "config": (
        lambda s: s["config"].update(hidden=8),
        r"the checkpoint is of another configuration \(hidden: expected 4, got 8\)",
    ),
    "config-key": (lambda s: s["config"].update(momentum=1), "unknown configuration key 'momentum'"),
    "missing": (drop_a_parameter, r"the checkpoint lacks parameter 'update\.layers\.0\.R'"),
    "foreign": (move_a_parameter, r"the checkpoint has a foreign parameter 'model\.9\.weight'"),
    "shape": (reshape_a_parameter, r"model\.0\.weight: expected \(4, 1\) torch\.float32, got \(3, 1\) torch\.float32"),
    "dtype": (change_a_dtype, r"model\.0\.weight: expected \(4, 1\) torch\.float32, got \(4, 1\) torch\.float64"),
}
RESUME_EDITS = {
    "progress": (lambda s: s["progress"].update(iteration="2"), "the checkpoint's progress is not valid"),
    "progress-key": (lambda s: s["progress"].pop("stale"), "the checkpoint's progress is not valid"),
    "rng": (lambda s: s["rng"].update(cpu=torch.zeros(3)), "the checkpoint's random state is not valid"),
    "groups": (lambda s: s["optimizer"]["param_groups"].clear(), "the optimizer state does not fit"),
    "moment": (
        reshape_a_moment,
        r"exp_avg of parameter 0: expected \(4, 1\) torch\.float32, got \(3,\) torch\.float32",
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
