"""Freed memory stays with the process when it is told so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# By itself glibc keeps more, or less, as the sizes it has seen and the neighbours of a piece have it: it would depend on
# chance what the comparison shows. With this variable every piece goes back, until mallopt overrides it.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
BYTES = 20 * (4 << 20) + 5 * (16 << 20)  # of an iteration of the script
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
    def faults(how: str) -> float:
        command = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | GIVES_BACK)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    given_back = faults("give back")
    assert faults("keep") < given_back / 10
    # A page that a fault brings in has 4 KiB, or 2 MiB where the system hands out huge ones.
    assert given_back >= BYTES / (2 << 20), "the test no longer shows what it is about"
