"""Computes the missing results of entries: two one-thread jobs side by side, resumable at any moment.

Each entry is computed by one `run` at a time; a second `run` takes the next entry. The jobs of an entry follow from its
results; a worker without a job takes one of a later entry. A job of an entry that runs alone waits until no other job
of this `run` is running, and meanwhile none starts. This code does not see other processes: the user must keep them
away, including another `run`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from kfo_ext.runs import RunFolder

from .entry import Computed, Entry, Roots
from .jobs import NUMERICS, Job, Record
from .store import Results
from .workers import Task, Worker

# A training run saves within a meta-iteration.
PATIENCE = 55.0


class Runner:
    """Computes entries at one budget.

    Args:
        entries: the entries, in order of priority.
        budget: the budget of their works.
        roots: the folder of each data set.
        runs: folder of the run folders, of the functions' states, and of locks.
        results: folder of the result files.
        jobs: number of processes.
        others: all entries by name, since an entry may follow another.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        budget: str,
        roots: Roots,
        runs: Path,
        results: Path,
        jobs: int = 2,
        others: Mapping[str, Entry] = MappingProxyType({}),
    ) -> None:
        self.budget, self.roots, self.runs = budget, dict(roots), runs
        self.results = [Results(entry, budget, results, others) for entry in entries if budget in entry.works]
        self.slots = jobs
        self.failed: dict[str, str] = {}
        self._locks = ExitStack()
        self._ours: set[str] = set()
        # With the lock of the run: entries may share a run, and other processes may run it.
        self._busy: dict[Worker, tuple[Results, str, IO[str]]] = {}
        self._stopping = False
        # Whether a worker whose parent was killed is still running.
        self._orphaned = False

    def run(self) -> bool:
        """Compute until nothing is missing that can be computed here, or a signal requests a stop.

        Returns:
            Whether nothing failed or was stopped.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        idle: list[Worker] = []
        with self._locks, _registered(self.runs), _on_signal(self._stop):
            try:
                while not self._stopping:
                    while len(self._busy) < self.slots and (found := self._next()):
                        worker = idle.pop() if idle else Worker()
                        self._begin(worker, *found)
                    if not (self._busy or self._orphaned):
                        break
                    if not self._busy:
                        time.sleep(1.0)
                    for connection in wait([worker.connection for worker in self._busy], timeout=1.0):
                        idle += self._take(next(w for w in self._busy if w.connection is connection))
            finally:
                for worker in idle:
                    worker.dismiss()
                for worker in self._busy:
                    worker.stop()
                end = time.monotonic() + PATIENCE
                for worker in [*idle, *self._busy]:
                    worker.join(max(0.0, end - time.monotonic()))
        for each in self.results:
            each.load()
            if not each.complete and not self._stopping and each.entry.name not in self.failed:
                _say(f"{each.entry.name}: left to another run, or waits for one of its entries")
        return not self._stopping and not self.failed

    def _next(self) -> tuple[Results, str, IO[str], Task] | None:
        """The first job that no process runs, and that may run beside the running ones."""
        self._orphaned = False
        if any(each.entry.alone for each, *_ in self._busy.values()):
            return None
        for each in self.results:
            if each.entry.alone and (self._busy or self._orphaned):
                continue
            if each.entry.name in self.failed or each.complete or not self._lock(each):
                continue
            roots = {data: self.roots[data] for data in each.entry.data}
            for name, key, work in _missing(each):
                folder = self._folder(name)
                if lock := _locked(folder.with_suffix(".lock")):
                    if not _in_use(folder):
                        return each, key, lock, Task(work, folder, roots)
                    lock.close()
                    self._orphaned = True
        return None

    def _folder(self, name: str) -> Path:
        folder = self.runs / f"numerics-{NUMERICS}" / name
        folder.parent.mkdir(exist_ok=True)
        return folder

    def _lock(self, each: Results) -> bool:
        """Whether this process holds the entry's lock; the system releases it when the process ends."""
        name = f"{each.entry.name}-{each.path.stem}"
        if name in self._ours:
            return True
        file = _locked(self.runs / f"{name}.lock")
        if file is None:
            return False
        self._locks.enter_context(file)
        self._ours.add(name)
        # Another process may have written the file.
        each.load()
        return True

    def _begin(self, worker: Worker, each: Results, key: str, lock: IO[str], task: Task) -> None:
        _say(f"{each.entry.name}: {_described(task.work)}")
        self._busy[worker] = each, key, lock
        worker.start(task)

    def _take(self, worker: Worker) -> list[Worker]:
        """Store the result of a worker; returns the worker if it can continue."""
        each, key, lock = self._busy.pop(worker)
        with lock:
            result = worker.result()
        if result.interrupted:
            return []
        if result.error:
            self.failed[each.entry.name] = result.error
            _say(f"{each.entry.name}: FAILED: {result.error}")
        elif isinstance(result.value, Record):
            each.add(key, result.value, list(result.environments))
            _say(f"{each.entry.name}: {_outcome(result.value)}")
        else:
            each.set(result.value, list(result.environments))
            _say(f"{each.entry.name}: computed")
        return [worker] if worker.alive else []

    def _stop(self) -> None:
        self._stopping = True
        _say("stopping: each run saves after its meta-iteration")


def _missing(each: Results) -> list[tuple[str, str, Job | Computed]]:
    """The works that can be computed now: name of the folder, key of the result, work."""
    work = each.work
    if isinstance(work, Computed):
        key = each.entry.key(each.budget)
        return [(f"{each.entry.name}-{key}", key, work)]
    return [(job.key, job.key, job) for job in work.missing(each.records)] if work else []


def pause(runs: Path) -> int:
    """Stop every `run` on these run folders after it has saved, and wait for it.

    Args:
        runs: folder of the run folders.

    Returns:
        The number of stopped processes.

    Raises:
        TimeoutError: a process has not stopped within a minute.
    """
    files = [path for path in runs.glob("*.pid") if _held(path)]
    for path in files:
        os.kill(int(path.read_text()), signal.SIGTERM)
    end = time.monotonic() + PATIENCE + 5
    while any(map(_held, files)) and time.monotonic() < end:
        time.sleep(0.2)
    if any(map(_held, files)):
        raise TimeoutError(f"{runs}: a run has not stopped within a minute")
    return len(files)


def _in_use(folder: Path) -> bool:
    """Whether a process trains this run."""
    lock = RunFolder(folder).lock
    return lock.exists() and _held(lock)


def _held(path: Path) -> bool:
    """Whether a living process holds the file."""
    file = _locked(path)
    if file is None:
        return True
    file.close()
    return False


@contextmanager
def _registered(runs: Path) -> Iterator[None]:
    """Register this process for `pause` in the block."""
    path = runs / f"{os.getpid()}.pid"
    file = _locked(path)
    assert file is not None
    file.write(str(os.getpid()))
    file.flush()
    try:
        yield
    finally:
        path.unlink()
        file.close()


def _locked(path: Path) -> IO[str] | None:
    """The file, locked; None if another process has it."""
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def _on_signal(stop: Any) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):
                signal.signal(number, handler)


def _described(work: Job | Computed) -> str:
    if isinstance(work, Computed):
        return "computing"
    shown = ("fast_lr", "init", "meta_lr", "clip_norm", "seed")
    settings = " ".join(f"{name}={work.settings[name]}" for name in shown if name in work.settings)
    return f"{settings} to {work.iterations}{' and tests' if work.tests else ''}"


def _outcome(record: Record) -> str:
    score = f"validation {record.best(record.iterations):.3f} by {record.iterations}"
    scores = [(test["checkpoint"], test.get("failure") or f"{test['mean']:.3f}") for test in record.tests]
    tests = "".join(f", {checkpoint} {score}" for checkpoint, score in scores)
    return f"{score}{tests}{f'; ended: {record.ended}' if record.ended else ''} ({record.seconds:.0f} s)"


def _say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()
