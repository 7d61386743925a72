"""Files of a run: kills and full disks at every write, wrong content, lost files, and scores at other settings."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from states import WAVES, assert_same

from kfo_ext.runs import RunFolder, checkpoint, files, metrics, plot_runs, run_folder
from kfo_ext.runs.metrics import Metrics, is_validation, read_metrics
from kfo_ext.runs.progress import Progress
from kfo_ext.trainer import (
    Config,
    Trainer,
    compare_runs,
    evaluate_run,
    load_learner,
    loop,
)


class Killed(BaseException):
    """Ends everything, and lets no one clean up."""


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def failing(step: int, error: Callable[[], BaseException]) -> Iterator[None]:
    """Raise the error at write step `step`: to make a folder, open, bring to the disk, replace; a kill: to append."""
    steps = count()

    def armed(function, *, after: bool = False):
        def call(*arguments, **options):
            fails = next(steps) == step
            if fails and not after:
                raise error()
            result = function(*arguments, **options)
            if fails:
                result.close()
                caught = error()
                # As the system's own: a failed open names the file, a failed write does not.
                caught.filename = arguments[0]
                raise caught
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", armed(open, after=True), raising=False)
        patch.setattr(metrics, "open", armed(open, after=True), raising=False)
        patch.setattr(os, "fsync", armed(os.fsync))
        patch.setattr(os, "replace", armed(os.replace))
        patch.setattr(Path, "mkdir", armed(Path.mkdir))
        if issubclass(type(error()), Killed):
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            patch.setattr(Metrics, "append", armed(Metrics.append))
        yield


def error_of(call: Callable[[], object]) -> BaseException | None:
    """What it raises, or None."""
    try:
        call()
    except BaseException as error:
        return error
    return None


@pytest.fixture
def plain_facts(monkeypatch):
    """A picture and facts of the machine that cost nothing, written as the real ones are."""
    monkeypatch.setattr(run_folder, "environment", lambda: {"command": "kfo"})
    monkeypatch.setattr(loop, "plot_runs", lambda runs, picture: files.write_json(picture, list(runs)))


def trace(run: RunFolder) -> list:
    """All that a finished run computed and wrote down."""
    state = checkpoint.load(run.last)
    records = [{**record, "elapsed": None} for record in read_metrics(run.metrics)]
    return [state["learner"], state["optimizer"], state["rng"], {**state["progress"], "elapsed": None}, records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbed."""
    trainer = Trainer.start(Config(**WAVES), tmp_path_factory.mktemp("whole") / "run")
    trainer.fit()
    return trace(trainer.run)


@pytest.mark.parametrize("error", [Killed, full_disk], ids=["kill", "full-disk"])
def test_an_interrupted_start_can_be_started_again_or_resumed(error, plain_facts, whole, tmp_path):
    resumed = 0
    for step in count():
        folder, copy = tmp_path / f"{step}", tmp_path / f"{step}-copy"
        with failing(step, error):
            caught = error_of(lambda folder=folder: Trainer.start(Config(**WAVES), folder))
        if caught is None:
            break
        if folder.exists():
            shutil.copytree(folder, copy)
        if (copy / "config.json").exists():
            Trainer.resume(copy).fit()
            assert_same(trace(RunFolder(copy)), whole)
            resumed += 1
        if (folder / "last.pt").exists():
            with pytest.raises(ValueError, match="already holds a run; resume it"):
                Trainer.start(Config(**WAVES), folder)
            again = Trainer.resume(folder)
        else:
            again = Trainer.start(Config(**WAVES), folder)
        again.fit()
        assert_same(trace(again.run), whole)
        assert not [name for name in os.listdir(folder) if name.endswith(".partial")]
    assert step >= 8
    assert resumed >= 5


@pytest.mark.parametrize("error", [Killed, full_disk], ids=["kill", "full-disk"])
def test_an_interrupted_training_can_be_resumed(error, plain_facts, whole, tmp_path):
    # A file takes four steps: every third one meets each of the four.
    for step in count(0, 3):
        trainer = Trainer.start(Config(**WAVES), tmp_path / f"{step}")
        with failing(step, error):
            caught = error_of(trainer.fit)
        if caught is None:
            break
        if error is full_disk:
            assert re.search(rf"{step}/[^/]+$", str(caught))
            assert "No space left on device" in str(caught)
        Trainer.resume(trainer.run.path).fit()
        assert_same(trace(trainer.run), whole)
    assert step >= 25


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let the system refuse to make any file larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_grows_too_large_is_named(tmp_path):
    with file_limit(2000), pytest.raises(OSError, match=r"run/last\.pt: cannot be written \(File too large\)"):
        Trainer.start(Config(**WAVES), tmp_path / "run")
    assert set(os.listdir(tmp_path / "run")) == {".lock", "config.json"}
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    path = trainer.run.metrics
    with Metrics(path, Progress(), 2) as log, file_limit(70):
        for iteration in (1, 2):
            log.append({"iteration": iteration, "loss": 0.5})
        with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be written \(File too large\)"):
            log.append({"iteration": 3, "loss": 0.5})
    assert path.stat().st_size == 70, "the third line is cut off"
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2]
    assert trainer.fit().reason == "finished"


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A finished run."""
    trainer = Trainer.start(Config(**WAVES), tmp_path / "run")
    trainer.fit()
    return trainer.run


# What JSON can hold, and a file of ours does not.
HOSTILE = (
    None, True, -1, 0, 2**70, 10**400, "x", "", "\0", "\ud800", [], [1], [[]], {}, {"iteration": 1}, 1.5, -1e30,
    json.loads("1e999"), json.loads("NaN"),
)  # fmt: skip
BROKEN = ("", "{", "nonsense", "[" * 100_000, "1" * 5000, "\ufeff{}", "{}{}")


def wrong_values(valid) -> Iterator[str]:
    """Texts of files that are not the valid one: other values, and other values in each of its places."""
    yield from BROKEN
    yield from map(json.dumps, HOSTILE)
    for key in valid if isinstance(valid, dict) else ():
        yield json.dumps({name: value for name, value in valid.items() if name != key})
        yield from (json.dumps({**valid, key: value}) for value in HOSTILE)


def refused(read: Callable[[], object], path: Path) -> bool:
    """Whether it is refused, which must be one ValueError that names the file, in one line."""
    error = error_of(read)
    if error is None:
        return False
    assert isinstance(error, ValueError)
    assert str(path) in str(error)
    assert "\n" not in str(error)
    return True


def test_a_wrong_config_file_is_refused_by_name(run):
    texts = list(wrong_values(json.loads(run.config.read_text())))
    count = 0
    for text in texts:
        run.config.write_text(text)
        count += refused(lambda: Config.load(run.config), run.config)
    assert count > 0.7 * len(texts)


def test_wrong_metrics_are_refused_before_training(run, monkeypatch):
    lines = run.metrics.read_text().splitlines()
    before = run.last.read_bytes()
    monkeypatch.setattr(loop.Trainer, "_step", lambda *_: pytest.fail("trained"))
    # Its artists are made; rendering them would take most of the time.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"picture"))
    for place in (0, 2):
        for text in wrong_values(json.loads(lines[place])):
            run.metrics.write_text("\n".join([*lines[:place], text, *lines[place + 1 :], ""]))
            if not refused(lambda: read_metrics(run.metrics), run.metrics):
                plot_runs({"run": run.metrics}, run.curve)
                continue
            if text not in BROKEN:
                continue
            with pytest.raises(ValueError, match=r"metrics\.jsonl: line"):
                Trainer.resume(run.path, iterations=6).fit()
            run.last.write_bytes(before)
    twice = [*lines[:2], lines[1], *lines[2:]]
    run.metrics.write_text("\n".join([*twice, ""]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 3: iteration 2 follows 2; mend the file, or move it"):
        read_metrics(run.metrics)


def test_a_wrong_environment_file_is_refused_before_training(run, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "_step", lambda *_: pytest.fail("trained"))
    for text in (*BROKEN, *(json.dumps(value) for value in HOSTILE if value != [])):
        run.environment.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{run.environment}: not a ")) as caught:
            Trainer.resume(run.path, iterations=6).fit()
        assert "\n" not in str(caught.value)


def test_a_wrong_evaluation_file_is_refused_by_name(run):
    path = evaluate_run(run, tasks=3).path
    valid = json.loads(path.read_text())
    texts = list(wrong_values(valid))
    for key in valid["task_list"]:
        texts += [json.dumps({**valid, "task_list": {**valid["task_list"], key: value}}) for value in HOSTILE]
    texts += [json.dumps({**valid, "scores": [*valid["scores"][:2], value]}) for value in HOSTILE]
    count = 0
    for text in texts:
        path.write_text(text)
        count += refused(lambda: compare_runs(run, run), path)
    assert count > 0.7 * len(texts)
    path.write_text(json.dumps({**valid, "mean": valid["mean"] + 0.1}))
    with pytest.raises(ValueError, match=r"eval-test-best\.json: .*its mean and interval are not those of its scores"):
        compare_runs(run, run)


def test_lost_metrics_are_named_and_the_run_goes_on(run, caplog):
    lines = run.metrics.read_text().splitlines(keepends=True)
    cases = {
        "all": ([], "4 of meta-iterations, the first of iteration 1 and 2 of validations, the first of iteration 2"),
        "gap": ([*lines[:1], *lines[2:]], "1 of meta-iterations, the first of iteration 2"),
        "end": (lines[:4], "1 of meta-iterations, the first of iteration 4 and 1 of validations, the first of"),
        "validation": ([line for line in lines if '"iteration": 2, "val' not in line], "1 of validations, the first"),
    }
    for iterations, (kept, message) in enumerate(cases.values(), start=5):
        state = run.last.read_bytes()
        run.metrics.write_text("".join(kept))
        caplog.clear()
        assert Trainer.resume(run.path, iterations=iterations).fit().progress.iteration == iterations
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert f"metrics.jsonl: lost records: {message}" in record.getMessage()
        run.last.write_bytes(state)
    run.metrics.write_text("".join(lines))
    caplog.clear()
    Trainer.resume(run.path, iterations=5).fit()
    assert not caplog.records


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_lost_best_checkpoint_is_named_and_replaced(damage, run, caplog):
    best = checkpoint.load(run.best)["progress"]["iteration"]
    damage(run.best)
    with pytest.raises(ValueError, match=rf"best\.pt: (the checkpoint, of iteration {best}, is lost|.* truncated)"):
        load_learner(run, "best")
    Trainer.resume(run.path, iterations=5).fit()
    assert re.search(rf"best\.pt: .*; it was of iteration {best}; the next validation counts as the best", caplog.text)
    assert checkpoint.load(run.best)["progress"]["best_iteration"] == 5
    assert load_learner(run, "best")[2].iteration == 5


def test_a_trainer_begins_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    for name in ("new", "made", "deep/er"):
        run = RunFolder(tmp_path / name)
        assert Trainer(Config(**WAVES), run).fit().reason == "finished"
        assert Config.load(run.config) == Config(**WAVES)
        assert evaluate_run(RunFolder.open(run.path), tasks=3).iteration > 0
        before = run.last.read_bytes()
        with pytest.raises(ValueError, match="already holds a run; resume it"):
            Trainer(Config(**WAVES), run).fit()
        assert run.last.read_bytes() == before
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(Config(**WAVES))
    assert trainer.fit().reason == "finished"
    assert trainer.run.path.parent == Path("runs")


def test_a_score_is_printed_before_it_is_written(kfo, run, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "open", read_only, raising=False)
    code, out, err = kfo("eval", run.path, "--tasks", 3)
    assert code == 2
    assert re.match(r"loss \d+\.\d+ ± ", out)
    assert err == f"kfo: {run.path}/eval-test-best.json: cannot be written (Read-only file system)\n"


def test_a_full_disk_is_one_line_that_names_the_file(kfo, tmp_path):
    with file_limit(1500):
        code, _, err = kfo("train", "--run", tmp_path / "new", "--dataset", "sinusoid")
    assert (code, err) == (2, f"kfo: {tmp_path}/new/last.pt: cannot be written (File too large)\n")


def test_validations_are_told_from_iterations(run):
    records = read_metrics(run.metrics)
    assert [r["iteration"] for r in records if is_validation(r)] == [2, 4]
