"""The bodies of the tests of a device run on the CPU: an error in one is seen before there is a device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

from kfo_ext.ops import library
from kfo_ext.testing import LARGE_CASES

# Of convolutions and batch norms, as the names of the tests have them.
LARGE_SHAPES = ("16x25x32x32x32x32", "16x4900x32", "1x25600x64")


@pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")
def test_their_bodies_pass():
    # On a CPU the large cases take longer than all others; test_derivatives.py has its own opcheck.
    small = " and ".join(f"not {name}" for name in (*LARGE_CASES, *LARGE_SHAPES, "opcheck"))
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", small, str(Path(__file__).parent / "gpu")]
    env = {**os.environ, "KFO_TEST_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=seconds(600))
    assert done.returncode == 0, done.stdout[-6000:]
    # Of those for Triton and for what CUDA alone has, each is skipped.
    assert int(re.search("([0-9]+) passed", done.stdout)[1]) > 200
