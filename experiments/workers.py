"""Worker processes that do one task at a time, each on one thread, and can be stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .entry import Computed
from .jobs import Job

# Leaves the processor to other programs, such as an editor or another measurement.
NICENESS = 10


@dataclass(frozen=True)
class Task:
    """The task of a worker: a job, or a function.

    Attributes:
        work: the job or the function.
        folder: folder of its state.
        roots: the folder of each data set of the entry; a job reads the first.
    """

    work: Job | Computed
    folder: Path
    roots: Mapping[str, Path]


@dataclass(frozen=True)
class Result:
    """The result of a worker: a record or a value with its environments, or the reason why there is none."""

    value: Any = None
    environments: tuple[dict[str, Any], ...] = ()
    error: str = ""
    interrupted: bool = False


class Worker:
    """A worker process. It starts at once, and ends with this process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, task: Task) -> None:
        """Begin a task; its result comes through `connection`."""
        self.connection.send(task)

    def result(self) -> Result:
        """Wait for the result."""
        try:
            return self.connection.recv()
        except EOFError:
            self._process.join()
            return Result(error=f"the process ended with status {self._process.exitcode}")

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return self._process.is_alive()

    def dismiss(self) -> None:
        """End the idle process."""
        self.connection.close()

    def stop(self) -> None:
        """Make the process save and end; a training run ends after its meta-iteration."""
        if self._process.is_alive():
            self._process.terminate()

    def join(self, seconds: float) -> None:
        """Wait for the process to end; kill it after `seconds`."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.nice(NICENESS)
    # Ctrl-C signals the whole group; the parent stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        result = _done(task)
        connection.send(result)
        if result.interrupted:
            return


def _end_with_parent() -> None:
    """Save and end when the parent has ended: it may have been killed, and the next `run` needs the run folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _done(task: Task) -> Result:
    # Imported here, so that an idle process does not load torch.
    import torch

    from kfo_ext.machine import environment
    from kfo_ext.trainer.evaluation import Cancelled

    from .training import OF_A_SESSION, Interrupted, carry_out

    torch.set_num_threads(1)
    try:
        if isinstance(task.work, Job):
            record, environments = carry_out(task.work, task.folder, next(iter(task.roots.values()), None))
            return Result(record, tuple(environments))
        value = task.work.function(roots=task.roots, folder=task.folder, **task.work.options)
        here = {name: fact for name, fact in environment().items() if name not in OF_A_SESSION}
        return Result(value, (here,))
    except (Cancelled, Interrupted):
        return Result(interrupted=True)
    except Exception as error:
        expected = isinstance(error, (OSError, ValueError))
        return Result(error=str(error) if expected else traceback.format_exc())
