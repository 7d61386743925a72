"""The command line: what it prints, what it writes, how it stops, and its one-line errors."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from deadlines import seconds

from kfo_ext import demo, testing
from kfo_ext.bench.names import ORDERS
from kfo_ext.cli import main
from kfo_ext.runs import checkpoint
from kfo_ext.trainer import Config, Trainer
from kfo_ext.trainer.datasets import DATASETS
from kfo_ext.trainer.listing import listed
from kfo_ext.trainer.recipe import build_learner
from kfo_ext.trainer.updates import UPDATES

TINY = {
    "dataset": "sinusoid",
    "hidden": 4,
    "inner-lr": 0.01,
    "steps": 1,
    "meta-batch": 2,
    "iterations": 2,
    "validation-every": 1,
    "validation-tasks": 2,
}


def options(**changes) -> list[str]:
    chosen = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [text for name, value in chosen.items() for text in (f"--{name}", str(value))]


def test_train_eval_compare(kfo):
    for run, update in (("a", "kfo"), ("b", "none")):
        code, out, err = kfo("train", "--run", run, *options(update=update))
        assert (code, err) == (0, "")
        assert f"run folder: {run}" in out
        assert re.search(
            r"finished at iteration 2 after \d+ s: best validation loss \d\.\d{4} at iteration [12]\n", out
        )
        assert f"files in {run}: config.json, metrics.jsonl, best.pt, last.pt, curve.png\nnext: kfo eval {run}\n" in out
        code, out, err = kfo("eval", run, "--tasks", 5)
        assert (code, err) == (0, "")
        written = json.loads(Path(run, "eval-test-best.json").read_text())
        assert f"loss {written['mean']:.4f} ± {written['interval']:.4f}  (95 % interval, 5 test tasks, best" in out
        assert len(written["scores"]) == written["task_list"]["tasks"] == 5
    code, out, err = kfo("compare", "a", "b")
    assert (code, err) == (0, "")
    assert "paired difference: " in out
    assert "settings that differ: update: kfo and none" in out
    assert len(re.findall(r"\(best checkpoint, iteration [12] of 2\)", out)) == 2
    assert "meta-iterations that differ" not in out
    code, out, err = kfo("eval", "a", "--tasks", 5, "--split", "validation", "--checkpoint", "last", "--threads", 1)
    assert code == 0
    assert json.loads(Path("a/eval-validation-last.json").read_text())["iteration"] == 2


def test_train_says_what_it_trains(kfo):
    small = options(hidden=8, steps=3, threads=1)
    code, out, _ = kfo("train", "--run", "a b", *small, "--hidden-layers", 1, "--no-adapt-update")
    assert code == 0
    maml = build_learner(Config.load(Path("a b/config.json")))
    count, learned = (sum(X.numel() for X in part.parameters()) for part in (maml.model, maml.update))
    assert out.splitlines()[:4] == [
        f"network: sinusoid_mlp (hidden 8), {count} parameters; maml adapts {count}",
        f"update: kfo (psd, hidden_layers 1, scale 1.0, bias), {learned:,} meta-parameters; inner steps 3, "
        "inner rate 0.01",
        "data: sinusoid (shots 10, queries 10); route vmap; device cpu, 1 thread",
        "run folder: a b",
    ]
    assert out.endswith("next: kfo eval 'a b'\n")
    out = kfo("train", "--resume", "a b", "--iterations", 3)[1]
    assert out.splitlines()[3] == "run folder: a b, from iteration 2"


@pytest.mark.parametrize(
    ("argv0", "program"),
    [
        ("my scripts/mine.py", "python 'my scripts/mine.py'"),
        ("lib/kfo_ext/__main__.py", "python -m kfo_ext"),
        ("bin/kfo", "kfo"),
        ("-c", "kfo"),
    ],
)
def test_the_next_command_is_of_the_program_that_ran(argv0, program, monkeypatch, capsys, tmp_path):
    """Only a script that adds networks of its own can evaluate them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kfo_ext.machine.keep_freed_memory", lambda: True)
    said = []
    for line in (["train", "--run", "a", *options(iterations=1)], ["compare", "a", "a"]):
        monkeypatch.setattr(sys, "argv", [argv0, *line])
        with pytest.raises(SystemExit):
            main()
        said.extend(capsys.readouterr())
    assert said[0].endswith(f"next: {program} eval a\n")
    assert f"not evaluated yet; run `{program} eval a --split" in said[3]


def test_a_run_without_any_iteration_can_be_trained_anew(kfo):
    """Training that diverged at once, here by its rate, or failed for another reason, leaves nothing worth keeping."""
    diverging = options(iterations=1, steps=5, inner_lr=1e30, update="none")
    code, _, err = kfo("train", "--run", "a", *diverging)
    assert code == 2 and "iteration 1: the support loss of step " in err and "--inner-lr" in err and "late" not in err
    assert kfo("train", "--run", "a", *options(iterations=1, update="none", seed=1))[0] == 0
    assert checkpoint.load(Path("a/last.pt"))["config"]["seed"] == 1
    assert len(json.loads(Path("a/environment.json").read_text())) == 1
    for remove in ("curve.png", "best.pt", "metrics.jsonl"):
        Path("a", remove).unlink()
        assert "already holds a run" in kfo("train", "--run", "a", *diverging)[2], "a checkpoint counts"


def test_a_run_of_the_command_line_is_that_of_the_trainer(kfo):
    """What it says before the first iteration changes no number."""
    kfo("train", "--run", "a", *options(dataset="glyphs", inner_lr=0.1, layers=1, threads=1))
    Trainer.start(Config.load(Path("a/config.json")), "b").fit()
    a, b = (checkpoint.load(Path(run, "last.pt")) for run in "ab")
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    assert all(torch.equal(a["learner"][name], X) for name, X in b["learner"].items())


def test_compare_says_how_far_both_were_trained(kfo):
    for run, iterations in (("a", 1), ("b", 3)):
        kfo("train", "--run", run, *options(iterations=iterations))
        kfo("eval", run, "--tasks", 5, "--checkpoint", "last")
    code, out, _ = kfo("compare", "a", "b", "--checkpoint", "last")
    assert code == 0
    assert "(last checkpoint, iteration 1 of 1)" in out and "(last checkpoint, iteration 3 of 3)" in out
    assert "meta-iterations that differ: 1 and 3\n" in out
    Path("a/metrics.jsonl").unlink()
    assert "(last checkpoint, iteration 1)\n" in kfo("compare", "a", "b", "--checkpoint", "last")[1]


def test_json_is_one_document_and_messages_go_elsewhere(kfo):
    for run in "ab":
        kfo("train", "--run", run, *options(seed=ord(run)))
        code, out, err = kfo("eval", run, "--tasks", 5, "--json")
        assert (code, err) == (0, f"written: {run}/eval-test-best.json\n")
        written = json.loads(Path(run, "eval-test-best.json").read_text())
        del written["scores"]
        assert json.loads(out) == {"run": run, **written, "current": True, "file": f"{run}/eval-test-best.json"}
    code, out, err = kfo("compare", "a", "b", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    means = [json.loads(Path(run, "eval-test-best.json").read_text())["mean"] for run in "ab"]
    assert [found[side]["mean"] for side in "ab"] == means
    assert found["difference"]["mean"] == pytest.approx(means[0] - means[1])
    assert (found["difference"]["tasks"], found["difference"]["split"]) == (5, "test")
    assert [found[side]["iterations"] for side in "ab"] == [2, 2]
    kfo("train", "--resume", "a", "--iterations", 3, "--validation-every", 1)
    Path("a/best.pt").write_bytes(Path("a/last.pt").read_bytes())
    code, out, err = kfo("compare", "a", "b", "--json")
    assert (code, err) == (0, "a: best.pt has been written since: evaluate it again\n")
    assert [json.loads(out)[side]["current"] for side in "ab"] == [False, True]


def test_a_shell_completes_commands_options_and_values(kfo, monkeypatch):
    monkeypatch.setenv("_KFO_COMPLETE", "complete_bash")
    for words, offered in (
        (["kfo", "ru"], {"runs"}),
        (["kfo", "train", "--inner"], {"--inner-lr"}),
        (["kfo", "train", "--dataset", ""], set(DATASETS)),
        (["kfo", "train", "--update", "meta"], {"meta_sgd", "meta_curvature"}),
        (["kfo", "eval", "--split", "t"], {"train", "test"}),
    ):
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        code, out, err = kfo()
        assert (code, set(out.split()), err) == (0, offered, "")
    monkeypatch.delenv("_KFO_COMPLETE")
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, err = kfo("--show-completion", "bash")
    assert (code, err) == (0, "") and "_KFO_COMPLETE=complete_bash" in out


def test_eval_is_reproducible(kfo):
    kfo("train", "--run", "a", *options())
    written = []
    for _ in range(2):
        kfo("eval", "a", "--tasks", 4)
        written.append(Path("a/eval-test-best.json").read_text())
    assert written[0] == written[1]


def test_train_chooses_a_folder_and_resume_continues_it(kfo, tmp_path):
    code, out, _ = kfo("train", *options(iterations=1))
    assert code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("sinusoid-maml-kfo-")
    code, out, _ = kfo("train", "--resume", run, "--iterations", 3)
    assert code == 0
    assert "finished at iteration 3" in out
    assert Config.load(run / "config.json").iterations == 3


def test_flags_and_numbers_reach_the_configuration(kfo):
    numbers = options(hidden_layers=1, scale=2.5, seed=5)
    code, _, err = kfo("train", "--run", "a", *numbers, "--no-psd", "--bias", "--first-order")
    assert (code, err) == (0, "")
    config = Config.load(Path("a/config.json"))
    assert (config.psd, config.bias, config.first_order, config.hidden_layers, config.seed) == (False, True, True, 1, 5)
    assert (config.scale, config.meta_lr) == (2.5, Config().meta_lr)


def test_time_budget_says_how_to_resume(kfo):
    code, out, _ = kfo("train", "--run", "a", *options(iterations=10**9, validation_every=10**9), "--time-budget", 0.2)
    assert code == 0
    assert "time budget at iteration" in out
    assert "resume with: kfo train --resume a" in out


ERRORS = {
    "dataset": (["train", "--dataset", "mnist"], f"dataset: expected one of {', '.join(DATASETS)}, got 'mnist'"),
    "update": (["train", "--update", "adam"], f"update: expected one of {', '.join(UPDATES)}, got 'adam'"),
    "number": (["train", "--inner-lr", "fast"], "Invalid value for '--inner-lr'"),
    "range": (["train", "--ways", "1"], "ways: expected at least 2, got 1"),
    "many-ways": (["train", "--ways", "5000"], "ways: expected 2 to 400"),
    "no-root": (["train", "--dataset", "omniglot"], "data_root: data set 'omniglot' needs the folder"),
    "missing-root": (["train", "--dataset", "omniglot", "--data-root", "nowhere"], "data_root: nowhere is no folder"),
    "device": (["train", "--device", "cuda:99"], "device: 'cuda:99' is not available here"),
    "option": (["train", "--temperature", "0.9"], "--temperature"),
    "command": (["predict"], "predict"),
    "budget": (["train", *options(), "--time-budget", "-1"], "Invalid value for '--time-budget'"),
    "resume": (["train", "--resume", "nowhere"], "nowhere: there is no such run folder"),
    "run-and-resume": (["train", "--resume", "a", "--run", "b"], "--run: the folder is that of --resume"),
    "eval": (["eval", "nowhere"], "nowhere: there is no such run folder"),
    "compare": (["compare", "nowhere", "nowhere"], "nowhere: there is no such run folder"),
    "nonfinite": (["train", *options(inner_lr=1e30, steps=3)], "iteration 1: "),
    "bench-axis": (
        ["bench", "--axes", "depth"],
        "axes: expected some of tasks, layers, width, hidden, psd, got 'depth'",
    ),
    "bench-provider": (["bench", "--providers", "native,ours"], "providers: expected some of native, lists"),
    "bench-order": (["bench", "--orders", "third"], "orders: expected some of forward, backward, double_backward"),
    "bench-group": (["bench", "--groups", "CNN(3)"], "groups: expected some of CNN(2), CNN(4)"),
    "bench-device": (["bench", "--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
    "bench-repeats": (["bench", "--repeats", "0"], "repeats: expected at least 1, got 0"),
    "bench-budget": (["bench", "--budget", "0"], "budget: expected seconds above 0, got 0"),
    "demo": (["demo", "--time-budget", "0"], "time_budget: expected seconds above 0, got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_exit_code_2(name, kfo):
    arguments, message = ERRORS[name]
    code, _, err = kfo(*arguments)
    assert code == 2
    assert err.startswith("kfo: ")
    assert message in err
    assert err.count("\n") == 1


def test_errors_about_an_existing_run(kfo, tmp_path):
    kfo("train", "--run", "a", *options())
    for arguments, message in (
        (["train", "--run", "a", *options()], "a: already holds a run"),
        (
            ["train", "--resume", "a", "--hidden", 8],
            "the checkpoint is of another configuration (hidden: expected 8, got 4)",
        ),
        (["eval", "a", "--split", "holdout"], "split: expected one of train, validation, test, got 'holdout'"),
        (["eval", "a", "--checkpoint", "first"], "checkpoint: expected best or last, got 'first'"),
        (["eval", "a", "--tasks", 1], "tasks: expected at least 2, got 1"),
        (["compare", "a", "a"], "a/eval-test-best.json: not evaluated yet"),
    ):
        code, _, err = kfo(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    (tmp_path / "a" / "last.pt").write_bytes(b"")
    code, _, err = kfo("train", "--resume", "a")
    assert (code, err.count("\n")) == (2, 1)
    assert "a/last.pt: not a checkpoint" in err


@pytest.mark.parametrize("arguments", [("train", "--resume", "nowhere"), ("demo", "--time-budget", "0")], ids=" ".join)
def test_commands_that_train_keep_freed_memory(arguments, kfo, monkeypatch):
    kept = []
    monkeypatch.setattr("kfo_ext.machine.keep_freed_memory", lambda: kept.append(True))
    kfo(*arguments)
    assert kept == [True]


def test_help_names_every_option(kfo):
    code, out, _ = kfo("train", "--help")
    assert code == 0
    for option in listed():
        assert f"--{option.name.replace('_', '-')}" in out
    # By what they belong to, each with its owners.
    for heading in ("Parts:", "Options of the data set:", "Options of the network:", "Options of the update:"):
        assert f"\n{heading}\n" in out
    assert re.search(r"\n +--psd / --no-psd +kfo: use", out)
    assert re.search(r"--inner-lr <float> +inner learning rate  \[default: 0\.1;\s+sinusoid: 0\.01", out)
    code, out, _ = kfo()
    assert code == 0
    assert all(
        command in out for command in ("train", "eval", "compare", "runs", "plot", "export", "doctor", "demo", "bench")
    )


@pytest.fixture
def train_without_end():
    """Starts `kfo train` in a process that does not outlive the test: run folder and streams to the process."""
    started = []

    def start(run, **streams) -> subprocess.Popen:
        command = [sys.executable, "-m", "kfo_ext", "train", "--run", str(run)]
        started.append(subprocess.Popen([*command, *options(iterations=10**9, validation_every=50)], **streams))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_metrics(run, process) -> None:
    deadline = time.monotonic() + seconds(60)
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size == 0:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_saves_and_ends_cleanly(train_without_end, tmp_path):
    run = tmp_path / "run"
    process = train_without_end(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_metrics(run, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=seconds(60))
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "SIGINT: stopping after this iteration and saving; once more after 1 s aborts at once" in err
    assert "it/s" not in err, "no progress bar where stderr is not a terminal"
    assert f"resume with: python -m kfo_ext train --resume {run}" in out
    iteration = checkpoint.load(run / "last.pt")["progress"]["iteration"]
    training = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "validation" not in line]
    assert iteration == len(training) > 0


def test_signals_at_once_save_and_end_cleanly(train_without_end, tmp_path):
    run = tmp_path / "run"
    process = train_without_end(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_metrics(run, process)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    out, err = process.communicate(timeout=seconds(60))
    assert process.returncode == 0, err
    assert err.count("stopping after this iteration and saving") == 1
    assert f"resume with: python -m kfo_ext train --resume {run}" in out
    assert checkpoint.load(run / "last.pt")["progress"]["iteration"] > 0


def test_a_terminal_gets_a_progress_bar(train_without_end, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = train_without_end(tmp_path / "run", stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    text, asked, deadline = b"", False, time.monotonic() + seconds(60)
    try:
        while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            text += os.read(ours, 65536)
            # Once: a second signal would abort.
            if b"loss=" in text and not asked:
                asked = True
                process.send_signal(signal.SIGTERM)
    except OSError:
        # Linux: the other end is closed.
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=seconds(10)) == 0
    assert b"it/s" in text
    assert b"SIGTERM: stopping" in text


def test_doctor_reports_each_backend(kfo):
    code, out, _ = kfo("doctor")
    assert code == 0
    assert f"torch {torch.__version__}" in out
    assert "reference: loads" in out
    assert "double backward: ok" in out
    for name in ("cpu", "cuda", "triton"):
        assert f"{name}: loads" in out or f"{name}: not available (" in out


def test_doctor_as_json(kfo):
    code, out, err = kfo("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["healthy"] and found["torch"] == torch.__version__
    assert set(found["backends"]) == {"reference", "cpu", "cuda", "triton"}
    tests = found["backends"]["reference"]["tests"]
    assert {(test["dtype"], test["order"]) for test in tests} == set(product(("float64", "float32"), ORDERS))
    assert all(test["ok"] and 0 <= test["error"] < 1e-4 for test in tests)


def test_doctor_fails_for_a_backend_that_is_wrong(kfo, monkeypatch):
    true = testing.transform

    def wrong(R, G, L, problems, *, backend):
        Y = true(R, G, L, problems, backend=backend)
        return Y if R.dtype == torch.float64 else Y * (1 + 1e-4)

    monkeypatch.setattr(testing, "transform", wrong)
    code, out, _ = kfo("doctor")
    assert code == 1
    assert "float32 forward: FAILED" in out
    monkeypatch.setattr(testing, "transform", lambda *a, **k: true(*a, **k) * float("nan"))
    assert kfo("doctor")[0] == 1
    code, out, _ = kfo("doctor", "--json")
    assert code == 1 and not json.loads(out)["healthy"]
    assert {test["error"] for test in json.loads(out)["backends"]["reference"]["tests"]} == {"nan"}


def test_demo_compares_both_methods(kfo, monkeypatch):
    monkeypatch.setattr(demo, "TRAINING", {**TINY, "iterations": 10**9, "validation-every": 10**9})
    monkeypatch.setattr(demo, "RATES", {"none": 0.01, "kfo": 0.01})
    code, out, err = kfo("demo", "--folder", "d", "--time-budget", 2, "--tasks", 4)
    assert (code, err) == (0, "")
    assert "MAML  loss" in out
    assert "KFO   loss" in out
    assert "KFO - MAML, paired: " in out
    assert "picture: d/curves.png" in out
    assert Path("d/curves.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = kfo("demo", "--folder", "d")
    assert (code, err) == (2, "kfo: d: expected an absent or empty folder\n")


def test_demo_says_which_part_failed(kfo, monkeypatch):
    monkeypatch.setattr(demo, "TRAINING", {"ways": 1})
    code, _, err = kfo("demo", "--folder", "d")
    assert code == 2
    assert err == "kfo: MAML failed: kfo: ways: expected at least 2, got 1 (all of it: d/none.log)\n"
