"""The folder of one run: where its files lie, and how it is made and opened."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kfo_ext.machine import environment

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
        apart = "".join(f"-{name}={quote(str(value), safe='')}" for name, value in changes.items())
        return self.path / f"eval-{split}-{checkpoint}{apart}.json"

    def evaluations(self, split: str, checkpoint: str) -> list[Path]:
        """The files of scores of one checkpoint on one split that there are, at whatever settings."""
        usual = self.evaluation(split, checkpoint)
        return [
            path for path in self.path.glob("eval-*.json") if path == usual or path.name.startswith(f"{usual.stem}-")
        ]

    @classmethod
    def make(cls, title: str) -> RunFolder:
        """Make runs/TITLE-TIME, with a number behind it if that exists."""
        return cls(new_folder(Path("runs") / f"{title}-{datetime.now():%Y%m%d-%H%M%S}"))

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

    def check_free(self, load_config: Callable[[Path], object]) -> None:
        """Check that a new run may begin here: in an absent or empty folder, or after an `unfinished` start.

        load_config: see `unfinished`.
        Raises: ValueError if the folder holds anything else.
        """
        # In this order: another start may make the folder meanwhile.
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a folder for the run, got a file")
        if self.path.is_dir() and self._content() and not self.unfinished(load_config):
            if self.config.exists():
                raise ValueError(f"{self.path}: already holds a run; resume it, or choose another folder")
            raise ValueError(f"{self.path}: expected an absent or empty folder for a new run")

    def unfinished(self, load_config: Callable[[Path], object]) -> bool:
        """Whether the folder holds nothing but a configuration: its run was stopped before the first checkpoint.

        load_config: reads config.json; raises ValueError for a file that is no configuration.
        """
        if self._content() != {self.config}:
            return False
        try:
            load_config(self.config)
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
