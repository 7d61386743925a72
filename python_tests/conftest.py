"""Settings of the whole suite: one thread unless a test asks for more, and NaN in uninitialised memory.

KFO_TEST_TIMEOUT_SCALE=3 gives the processes that tests start three times as long, for a slow or busy machine.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

# Under nohup or in the background of a shell, SIGINT is ignored, and would be in every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes of two tests run side by side: with more threads than cores both would wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files whose tests start compilers or whole suites: begun last, they would run on alone.
LONGEST_FIRST = ("test_isa", "test_cuda_host", "test_packaging", "test_gpu_tests_on_cpu", "test_triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the longest files to the front, each file's tests in their order."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seeds torch, and fills what torch.empty returns with NaN, so that an element never written is seen."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Filling is part of torch's deterministic mode; an operation without a deterministic form only warns.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def kfo(capsys, monkeypatch, tmp_path):
    """Runs `kfo` in this process and in tmp_path: arguments to (exit code, stdout, stderr)."""
    from kfo_ext import cli

    monkeypatch.chdir(tmp_path)
    # It would hold for the tests after this one too.
    monkeypatch.setattr("kfo_ext.machine.keep_freed_memory", lambda: True)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kfo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    return call
