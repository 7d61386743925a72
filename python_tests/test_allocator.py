"""Freed memory stays with the process when it is told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from kfo_ext.trainer.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def iterate():
    pieces = [torch.ones(1 << 20) for _ in range(20)] + [torch.ones(1 << 22) for _ in range(5)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(2):
    iterate()
before = faults()
for _ in range(4):
    iterate()
print((faults() - before) / 4)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_kept_is_not_faulted_in_again():
    pages = (20 * (4 << 20) + 5 * (16 << 20)) / 4096

    def faults(how: str) -> float:
        command = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert faults("keep") < pages / 10
    assert faults("give back") > pages / 4, "the test no longer shows what it is about"
