"""Large outputs of the CPU operators are advised to lie in huge pages, and KFO_HUGE_PAGES=0 leaves them alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

from kfo_ext.ops import library

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built"),
    pytest.mark.skipif(not MODES.exists(), reason="the system has no transparent huge pages"),
]

# Prints whether the advice stands for the memory of an output, whose channels differ.
PROGRAM = """
import re, torch
from kfo_ext.functional import conv2d

channels = {channels}
y = conv2d(torch.randn(2, 8, 32, 32, 3), torch.randn(2, channels, 3, 3, 3), stride=1, padding=1)
at = y.data_ptr() + y.numel() * 2
for mapping in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    begin, end = (int(x, 16) for x in re.match("([0-9a-f]+)-([0-9a-f]+) ", mapping).groups())
    if begin <= at < end:
        print("hg" in re.search("VmFlags:(.*)", mapping)[1].split())
"""


def advised(channels: int, **variables: str) -> bool:
    program = PROGRAM.format(channels=channels)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds(60),
    )
    (answer,) = re.findall("True|False", done.stdout)
    return answer == "True"


def test_large_outputs_are_advised_unless_it_is_turned_off():
    assert advised(32)
    assert not advised(32, KFO_HUGE_PAGES="0")


def test_small_outputs_are_left_alone():
    # 2 x 8 x 32 x 32 numbers: 64 KiB.
    assert not advised(1)
