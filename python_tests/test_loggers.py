"""Loggers: functions of records, and adapters that import nothing before they are asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
from states import WAVES, assert_same

from kfo_ext.runs.loggers import LOGGERS, checked
from kfo_ext.runs.metrics import is_validation, read_metrics
from kfo_ext.trainer import Config, Trainer


def test_a_function_gets_every_record_of_its_call(tmp_path):
    first, second, plain = [], [], []
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.fit(loggers=[first.append, plain.append])
    assert first == plain == read_metrics(trainer.run.metrics)
    assert [is_validation(record) for record in first] == [False, False, True] * 2
    again = Trainer.resume(tmp_path / "run", iterations=6)
    again.fit(loggers=[second.append])
    assert first + second == read_metrics(again.run.metrics)


def test_what_a_function_does_with_a_record_is_its_own(tmp_path):
    seen = []
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.fit(loggers=[dict.clear, seen.append])
    assert seen == read_metrics(trainer.run.metrics)


def test_what_a_function_raises_ends_the_call_and_leaves_the_run_whole(tmp_path):
    def full(record):
        if record["iteration"] == 3:
            raise OSError("the disk is full")

    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    with pytest.raises(OSError, match="the disk is full"):
        trainer.fit(loggers=[full])
    whole = Trainer.start(Config(**WAVES), tmp_path / "whole")
    whole.fit()
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.progress.iteration == 2
    resumed.fit()
    assert_same(resumed.learner.state_dict(), whole.learner.state_dict())


@pytest.mark.parametrize(
    ("loggers", "error", "message"),
    [
        (["mlflow"], ValueError, "loggers: expected one of tensorboard, wandb, got 'mlflow'"),
        ([3], TypeError, "loggers: expected names and functions of one record, got 3"),
        ("wandb", TypeError, "loggers: expected a list of names and functions, got 'wandb'"),
    ],
)
def test_bad_loggers_are_refused(loggers, error, message, tmp_path):
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    with pytest.raises(error) as caught:
        trainer.fit(loggers=loggers)
    assert str(caught.value) == message
    assert not trainer.run.metrics.exists()


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_and_leaves_no_folder(name, module, kfo, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    code, out, err = kfo("train", "--log", name, "--run", "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"kfo: loggers: '{name}' needs the package {module}, which cannot be imported (")
    assert err.endswith(f"install it: pip install {module}\n")
    assert not (tmp_path / "run").exists()


def test_the_command_names_what_there_is(kfo):
    code, _, err = kfo("train", "--log", "mlflow", "--run", "run")
    assert (code, err) == (2, "kfo: loggers: expected one of tensorboard, wandb, got 'mlflow'\n")
    said = " ".join(kfo("train", "--help")[1].split())
    assert all(f"{name} ({adapter.help})" in said for name, adapter in LOGGERS.items())


def test_nothing_is_imported_before_it_is_asked_for():
    """Neither by the package nor by a training with a function as its logger."""
    code = (
        "import sys, tempfile\n"
        "from kfo_ext.trainer import Config, Trainer\n"
        f"Trainer.start(Config(**{WAVES!r}), tempfile.mkdtemp() + '/run').fit(loggers=[lambda record: None])\n"
        "assert not {'tensorboard', 'torch.utils.tensorboard', 'wandb'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class FakeWriter:
    """torch.utils.tensorboard's writer, as a list of what it was told."""

    def __init__(self, told: list, folder: str, purge_step: int | None) -> None:
        self.told = told
        told.append(("open", folder, purge_step))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.told.append(("close",))

    def add_text(self, tag, text, step):
        self.told.append(("text", tag, step, "| inner_lr | 0.01 |" in text))

    def add_scalar(self, tag, value, step):
        self.told.append((tag, value, step))


def test_tensorboard_gets_the_numbers_by_iteration(tmp_path, monkeypatch):
    told = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, purge_step=None: FakeWriter(told, folder, purge_step)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.fit(loggers=["tensorboard"])
    folder = str(tmp_path / "run" / "tensorboard")
    assert told[:2] == [("open", folder, None), ("text", "configuration", 0, True)]
    assert told[-1] == ("close",)
    records = read_metrics(trainer.run.metrics)
    for tag, name in (("training/loss", "loss"), ("training/learning_rate", "learning_rate"),
                      ("validation/loss", "validation_loss")):  # fmt: skip
        expected = [(tag, record[name], record["iteration"]) for record in records if name in record]
        assert [entry for entry in told if entry[0] == tag] == expected
    told.clear()
    # What a killed process logged of the iterations to come counts no more.
    Trainer.resume(tmp_path / "run", iterations=6).fit(loggers=["tensorboard"])
    assert told[0] == ("open", folder, 5)
    assert {entry[2] for entry in told if entry[0] == "training/loss"} == {5, 6}


@pytest.mark.parametrize("left", ["tensorboard/events", "wandb/run", "wandb-id"])
def test_what_a_logger_leaves_of_an_untrained_run_does_not_stop_the_next(tmp_path, left):
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="iteration 1: "):
        Trainer.start(Config(**WAVES | {"inner_lr": 1e30, "steps": 5}), run).fit()
    path = run / left
    path.parent.mkdir(exist_ok=True)
    path.write_text("kept")
    assert Trainer.start(Config(**WAVES), run).fit().reason == "finished"
    assert path.read_text() == "kept"


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer.start(Config(**WAVES), tmp_path / "run").fit(loggers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2, 3, 4]


class FakeSession:
    """A run of Weights & Biases."""

    def __init__(self, told: list) -> None:
        self.told = told

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.told.append(("finish", kind))

    def define_metric(self, name, step_metric):
        self.told.append(("axis", name, step_metric))

    def log(self, values):
        self.told.append(("log", values))


def test_wandb_goes_on_with_its_own_run(tmp_path, monkeypatch):
    told, started = [], []
    module = ModuleType("wandb")
    module.init = lambda **options: started.append(options) or FakeSession(told)
    monkeypatch.setitem(sys.modules, "wandb", module)
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.fit(loggers=["wandb"])
    assert told[0] == ("axis", "*", "iteration")
    assert told[-1] == ("finish", None)
    first, _, validation = [entry[1] for entry in told if entry[0] == "log"][:3]
    records = read_metrics(trainer.run.metrics)
    assert first["iteration"] == 1 and first["training/loss"] == records[0]["loss"]
    assert validation["iteration"] == 2 and validation["validation/loss"] == records[2]["validation_loss"]
    Trainer.resume(tmp_path / "run", iterations=5).fit(loggers=["wandb"])
    Trainer.start(Config(**WAVES), tmp_path / "other").fit(loggers=["wandb"])
    ids = [options["id"] for options in started]
    assert ids[0] == ids[1] != ids[2]
    assert started[0]["resume"] == "allow" and started[0]["config"]["inner_lr"] == 0.01
    assert started[0]["dir"] == str(tmp_path / "run")


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(ImportError, match=r"loggers: 'wandb' needs the package wandb, .* \(what is imported is not"):
        checked(["wandb"])


def test_loggers_change_no_number(tmp_path, monkeypatch):
    module = ModuleType("wandb")
    module.init = lambda **options: FakeSession([])
    monkeypatch.setitem(sys.modules, "wandb", module)
    trainers = [Trainer.start(Config(**WAVES), tmp_path / name) for name in ("with", "without")]
    trainers[0].fit(loggers=["wandb", lambda record: record.clear()])
    trainers[1].fit()
    assert_same(*(trainer.learner.state_dict() for trainer in trainers))
    with pytest.raises(ValueError, match="loggers: expected each once, got 'wandb' several times"):
        checked(["wandb", "wandb"])
