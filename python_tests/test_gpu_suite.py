"""What runs on a CUDA machine, exercised without one: the gpu tests skip, and gpu_suite.sh reports every part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "bench" / "gpu_suite.sh"

pytestmark = pytest.mark.skipif(not SUITE.exists(), reason="bench/ is not beside the tests")


def suite(folder: Path, python: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs the suite with a shell script in the place of Python."""
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), "OUT": str(folder / "out"), **settings}
    return subprocess.run(["bash", str(SUITE)], env=env, capture_output=True, text=True, timeout=60)


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
        timeout=120,
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
    assert len(skipped) == 11 and all("no CUDA device" in line for line in skipped)
    assert lines[-1].startswith("== 6 passed, 0 failed, 11 skipped in ")
    assert (tmp_path / "out" / "doctor.log").exists()


def test_a_failing_part_is_reported_and_the_rest_goes_on(tmp_path):
    done = suite(tmp_path, 'case "$*" in *doctor*) echo of no use; exit 3;; -c*) exit 1;; esac')
    assert done.returncode == 1
    assert "FAILED   doctor" in done.stdout and "status 3" in done.stdout and "    of no use" in done.stdout
    assert "== 5 passed, 1 failed, 11 skipped" in done.stdout


def test_a_part_out_of_time_is_cut_and_later_ones_are_left_out(tmp_path):
    done = suite(tmp_path, 'case "$*" in *doctor*) exec sleep 50;; esac', PARTS="doctor op_tests loads", BUDGET="6")
    assert done.returncode == 1
    assert "timed out after" in done.stdout
    assert done.stdout.count("the budget of 6 s is spent") == 2
    assert "== 0 passed, 1 failed, 2 skipped" in done.stdout


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SUITE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
