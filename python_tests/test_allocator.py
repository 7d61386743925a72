"""Freed memory stays with the process when it is told so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from deadlines import seconds

# By itself glibc keeps more, or less, as the sizes it has seen and the neighbours of a piece have it: it would depend
# on chance what the comparison shows. With this variable every piece goes back, until mallopt overrides it.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
BYTES = 20 * (4 << 20) + 5 * (16 << 20)  # of an iteration of the script
SCRIPT = """
import resource, sys, torch
from kfo_ext.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def make():
    return [torch.ones(1 << 20) for _ in range(20)] + [torch.ones(1 << 22) for _ in range(5)]

held = make() if sys.argv[1] == "hold" else None

def iterate():
    pieces = held or make()
    for piece in pieces:
        piece.add_(1)

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
        command, env = [sys.executable, "-c", SCRIPT, how], os.environ | GIVES_BACK
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(120), env=env)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    # The system may unmap pages on its own account, to see which processor uses them.
    of_the_system = faults("hold")
    given_back = faults("give back") - of_the_system
    assert faults("keep") - of_the_system < given_back / 10
    # A page that a fault brings in has 4 KiB, or 2 MiB where the system hands out huge ones.
    assert given_back >= BYTES / (2 << 20), "the test no longer shows what it is about"
