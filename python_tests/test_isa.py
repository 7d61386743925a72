"""Every instruction set's CPU kernels pass the operators' tests; each set is chosen at load, hence a process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

from kfo_ext.ops import library

TESTS = Path(__file__).parent
# What runs the compiled operators.
FILES = ("test_transform.py", "test_batch_norm.py", "test_conv.py", "test_accuracy.py")
# What no instruction set changes: registrations, rules of differentiation, and plain torch; and the largest factors.
SAME = "not (opcheck or compile or grouped or reference or gradcheck or square_784)"

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


def _run(isa: str, *command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "KFO_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=seconds(900))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_each_isa(isa):
    if isa not in library.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    if isa == library.cpu_isa():
        pytest.skip("the isa in use: the files themselves run it")
    files = [str(TESTS / file) for file in FILES]
    done = _run(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SAME, *files)
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_isa_is_refused():
    done = _run(
        "avx1024",
        "-c",
        "import torch, kfo_ext; kfo_ext.transform(*(torch.ones(1, 1),) * 3, kfo_ext.Problems([(1, 1, 1)]))",
    )
    assert done.returncode != 0
    assert "KFO_CPU_ISA: expected avx512, avx2 or baseline, got 'avx1024'" in done.stderr
    named = _run("avx1024", "-c", "from kfo_ext.ops import library; library.cpu_isa()")
    assert "KFO_CPU_ISA: expected one of" in named.stderr
