"""The folder of one run: where its files lie, and how it is made and opened."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kfo_ext

from .config import Config
from .files import new_folder, partials, read_json, write_json


class RunFolder:
    """Paths of a run: config.json, metrics.jsonl, last.pt, best.pt, curve.png, environment.json, eval-*.json, .lock.

    Readers take no lock, and delete nothing: each file is whole at any time. Writers are within `writing`.

    path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.curve = self.path / "curve.png"
        self.environment = self.path / "environment.json"
        self.lock = self.path / ".lock"

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint best or last."""
        if name not in ("best", "last"):
            raise ValueError(f"checkpoint: expected best or last, got {name!r}")
        return self.path / f"{name}.pt"

    def evaluation(self, split: str, checkpoint: str, **changes: Any) -> Path:
        """Path of the scores of one checkpoint on one split.

        changes: settings that are not the run's own: their scores are files of their own.
        """
        apart = "".join(f"-{name}={value}" for name, value in changes.items())
        return self.path / f"eval-{split}-{checkpoint}{apart}.json"

    @classmethod
    def make(cls, config: Config) -> RunFolder:
        """Make runs/DATASET-METHOD-UPDATE-TIME, with a number behind it if that exists."""
        name = f"{config.dataset}-{config.method}-{config.update}-{datetime.now():%Y%m%d-%H%M%S}"
        return cls(new_folder(Path("runs") / name))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open the folder of an existing run.

        Raises: ValueError if there is none.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise ValueError(f"{run.path}: there is no such run folder")
        if not run.config.is_file():
            raise ValueError(f"{run.path}: not a run folder, it has no config.json")
        return run

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run's lock; the system releases it when the process ends, however it ends.

        flock: it holds between threads and processes of a machine, and over NFS if the server supports it; of a
        distributed training, only one rank may own the folder.

        Raises: ValueError if another writer holds it, OSError naming the lock if the file system has none.
        """
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.path}: another process or trainer is writing this run; wait for its end, or stop it"
                ) from None
            except OSError as error:
                raise OSError(f"{self.lock}: cannot be locked ({error.strerror})") from error
            yield
        finally:
            os.close(descriptor)

    def check_free(self) -> None:
        """Check that a new run may begin here: in an absent or empty folder, or after an `unfinished` start.

        Raises: ValueError if the folder holds anything else.
        """
        # In this order: another start may make the folder meanwhile.
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a folder for the run, got a file")
        if self.path.is_dir() and self._content() and not self.unfinished():
            if self.config.exists():
                raise ValueError(f"{self.path}: already holds a run; resume it, or choose another folder")
            raise ValueError(f"{self.path}: expected an absent or empty folder for a new run")

    def unfinished(self) -> bool:
        """Whether the folder holds nothing but a configuration: its run was stopped before the first checkpoint."""
        if self._content() != {self.config}:
            return False
        try:
            Config.load(self.config)
        except ValueError:
            return False
        return True

    def remove_partials(self) -> None:
        """Delete what killed writers left of unfinished writes; within `writing` only.

        Files of evaluations stay: those are written without the lock.
        """
        for partial in self._partials():
            partial.unlink()

    def record_environment(self) -> None:
        """Append this process to environment.json: a resumed run may move to another machine.

        Raises: ValueError if the file is not the list that it should be.
        """
        sessions = read_json(self.environment) if self.environment.exists() else []
        if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
            raise ValueError(f"{self.environment}: not a list of sessions; move the file away to go on without it")
        write_json(self.environment, [*sessions, environment()])

    def _content(self) -> set[Path]:
        return set(self.path.iterdir()) - {self.lock} - set(self._partials())

    def _partials(self) -> list[Path]:
        return partials((self.config, self.metrics, self.last, self.best, self.curve, self.environment))


def environment() -> dict[str, Any]:
    """Describe this process: machine, versions, git commit of the package if it lies in a checkout, command."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "kfo_ext": kfo_ext.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def processor_name() -> str:
    """The processor as Linux names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
