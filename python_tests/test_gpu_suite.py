"""What runs on a CUDA machine, exercised without one: the gpu tests skip, and gpu_suite.sh reports every part."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

from kfo_ext import cli

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "bench" / "gpu_suite.sh"


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def suite(folder: Path, python: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs the suite with a shell script in the place of Python."""
    env = {**os.environ, "PYTHON": script(folder / "python", python), "OUT": str(folder / "out"), **settings}
    return subprocess.run(["bash", str(SUITE)], env=env, capture_output=True, text=True, timeout=seconds(60))


def test_gpu_tests_skip_without_a_device():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            str(ROOT / "python_tests" / "gpu"),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "KFO_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=seconds(120),
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout
    assert "skipped" in last and "passed" not in last and "deselected" not in last
    assert "no CUDA device: torch.cuda.is_available() is false" in done.stdout


def test_without_a_device_its_parts_are_skipped_and_counted(tmp_path):
    # The question for a device is the one call with -c.
    done = suite(tmp_path, 'test "$1" != -c')
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("passed")] == [
        "build", "doctor", "op_tests", "case_on_host", "bench_on_host", "precision_on_host",
    ]  # fmt: skip
    skipped = [line for line in lines if line.startswith("skipped")]
    assert len(skipped) == 15 and all("no CUDA device" in line for line in skipped)
    assert lines[-1].startswith("== 6 passed, 0 failed, 15 skipped in ")
    assert (tmp_path / "out" / "doctor.log").exists()


def test_a_failing_part_is_reported_and_the_rest_goes_on(tmp_path):
    done = suite(tmp_path, 'case "$*" in *doctor*) echo of no use; exit 3;; -c*) exit 1;; esac')
    assert done.returncode == 1
    assert "FAILED   doctor" in done.stdout and "status 3" in done.stdout and "    of no use" in done.stdout
    assert "== 5 passed, 1 failed, 15 skipped" in done.stdout


def test_a_part_out_of_time_is_cut(tmp_path):
    done = suite(tmp_path, 'case "$*" in *doctor*) exec sleep 50;; -c*) exit 1;; esac', PARTS="doctor", LIMIT="1")
    assert done.returncode == 1
    assert "timed out after 1 s" in done.stdout
    assert "== 0 passed, 1 failed, 0 skipped" in done.stdout


def test_a_part_gets_no_more_than_what_is_left(tmp_path):
    done = suite(tmp_path, 'test "$1" != -c', PARTS="build", BUDGET="100")
    assert done.returncode == 0
    assert 5 <= int(re.search("== build, at most ([0-9]+) s: ", done.stdout)[1]) <= 100


@pytest.mark.parametrize("device", [0, 1], ids=["device", "no device"])
def test_parts_left_out_for_time_are_no_success(device, tmp_path):
    done = suite(tmp_path, f'test "$1" != -c || exit {device}', PARTS="build doctor loads", BUDGET="4")
    assert done.returncode == 1
    assert done.stdout.count("the budget of 4 s is spent") == 3 - device
    assert "== 0 passed, 0 failed, 3 skipped" in done.stdout


@pytest.fixture
def on_a_device(tmp_path):
    """What the suite prints, and the command lines of Python in it, where everything for a device is there."""
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    for tool in ("ncu", "compute-sanitizer"):
        script(tmp_path / tool, 'while [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"')
    done = suite(tmp_path, 'test "$1" = -c || echo "$*" >>"$OUT/commands"', PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, (tmp_path / "out" / "commands").read_text().splitlines()


def test_on_a_device_what_matters_most_comes_first(on_a_device):
    printed, _ = on_a_device
    assert re.findall("^passed +([a-z_]+)", printed, re.MULTILINE) == [
        "build", "doctor", "loads", "gpu_tests", "bench", "compiled", "meta", "meta_jax", "precision", "conv_forms",
        "ncu", "memory", "case", "memcheck", "racecheck", "initcheck", "synccheck",
    ]  # fmt: skip


class Parsed(Exception):
    """A script has taken its arguments."""


def test_scripts_take_the_arguments_they_are_given(on_a_device, monkeypatch, tmp_path):
    true = argparse.ArgumentParser.parse_args

    def parse_args(parser, arguments):
        true(parser, arguments)
        raise Parsed

    no_arguments = argparse.ArgumentParser(), []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    suite(tmp_path, 'test "$1" != -c && echo "$*" >>"$OUT/commands"')
    commands = on_a_device[1] + (tmp_path / "out" / "commands").read_text().splitlines()
    parsed = set()
    for name, *arguments in map(str.split, commands):
        assert name == "-m" or (ROOT / name).exists()
        assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("python_tests"))
        if name.startswith("bench/"):
            with pytest.raises(Parsed):
                importlib.import_module(f"bench.{Path(name).stem}").main(arguments)
            parsed.add(Path(name).stem)
        elif arguments[:2] == ["kfo_ext", "bench"]:
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr("torch.cuda.is_available", lambda: True)
                patch.setattr("kfo_ext.bench.command.run", lambda settings, folder, echo: parse_args(*no_arguments))
                cli.app(arguments[1:], standalone_mode=False)
            parsed.add("kfo bench")
    assert parsed == {"kfo bench", "meta_peers", "precision", "conv_forms", "one_call", "sanitize_case"}


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SUITE)], capture_output=True, text=True, timeout=seconds(60))
    assert done.returncode == 0, done.stdout
