"""The CUDA kernels compiled as plain C++, one fiber per thread, against float64, under AddressSanitizer and UBSan.

No GPU is needed. Shared memory and every output start as NaN, and a thread that misses a barrier is an error.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
ROUNDS = 12

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_and_run(csrc: Path, folder: Path, *flags: str, rounds: int) -> subprocess.CompletedProcess:
    program = folder / "kernels_test"
    host = HERE / "cuda_host"
    sources = ["-I", str(csrc), "-include", str(host / "host_device.h"), str(host / "kernels_test.cpp")]
    subprocess.run(["g++", "-std=c++17", *flags, *sources, "-o", str(program)], check=True, timeout=300)
    return subprocess.run([str(program), str(rounds)], capture_output=True, text=True, timeout=300)


def test_kernels_equal_float64_under_sanitizers(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = compile_and_run(CSRC, tmp_path, *flags, rounds=ROUNDS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "comparisons, worst error" in done.stdout


# Each breaks one line of a kernel; the run must fail, or the tests above prove nothing.
BREAKS = {
    "barrier": ("transform_backward.cuh", "  __syncthreads();\n\n  T* partial", "  T* partial"),
    "factor": ("transform_double_backward.cuh", "block.view(S), L.transposed()", "block.view(M), L.transposed()"),
    "sum": ("sum.cuh", "i < first + count", "i < first + count - 1"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_caught(name, tmp_path):
    file, right, wrong = BREAKS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert text.count(right) == 1
    (csrc / "cuda" / file).write_text(text.replace(right, wrong))
    assert compile_and_run(csrc, tmp_path, "-O1", rounds=2).returncode != 0
