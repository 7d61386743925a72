"""The folder of one run: the paths of its files, and how it is created and opened."""

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

    Loggers add tensorboard/, or wandb/ and wandb-id.

    Readers take no lock and delete nothing: each file is complete at any time. Writers hold `writing`.

    Args:
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
        self.tensorboard = self.path / "tensorboard"
        self.wandb = self.path / "wandb"
        self.wandb_id = self.path / "wandb-id"

    def checkpoint(self, name: str) -> Path:
        """The path of the checkpoint best or last."""
        if name not in ("best", "last"):
            raise ValueError(f"checkpoint: expected best or last, got {name!r}")
        return self.path / f"{name}.pt"

    def evaluation(self, split: str, checkpoint: str, **changes: Any) -> Path:
        """The path of the scores of one checkpoint on one split.

        Args:
            split: train, validation or test.
            checkpoint: best or last.
            changes: settings that differ from the run's; each combination has its own file.

        Returns:
            The path, whether or not the file exists.
        """
        apart = "".join(f"-{name}={quote(str(value), safe='')}" for name, value in changes.items())
        return self.path / f"eval-{split}-{checkpoint}{apart}.json"

    def evaluations(self, split: str, checkpoint: str) -> list[Path]:
        """The existing files of scores of one checkpoint on one split, at any settings."""
        usual = self.evaluation(split, checkpoint)
        return [
            path for path in self.path.glob("eval-*.json") if path == usual or path.name.startswith(f"{usual.stem}-")
        ]

    @classmethod
    def make(cls, title: str) -> RunFolder:
        """Make runs/TITLE-TIME, with a number appended if that exists."""
        return cls(new_folder(Path("runs") / f"{title}-{datetime.now():%Y%m%d-%H%M%S}"))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open the folder of an existing run.

        Args:
            path: the folder.

        Returns:
            The run folder.

        Raises:
            ValueError: there is no such run.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise ValueError(f"{run.path}: there is no such run folder")
        if not run.config.is_file():
            raise ValueError(f"{run.path}: not a run folder, it has no config.json")
        return run

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run's lock; the system releases it when the process ends for any reason.

        The lock is flock's: it works between threads and processes of a machine, and over NFS if the server supports
        it. In distributed training, only one rank may own the folder.

        Yields:
            Nothing; the lock is held in the block.

        Raises:
            ValueError: another writer holds the lock.
            OSError: the file system has no locks; the message names the lock.
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
        """Check that a new run may begin here: in an absent or empty folder, or one `unfinished` or `untrained`.

        Args:
            load_config: see `unfinished`.

        Raises:
            ValueError: the folder holds anything else.
        """
        # In this order: another process may create the folder in between.
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a folder for the run, got a file")
        taken = self.path.is_dir() and self._content()
        if taken and not self.unfinished(load_config) and not self.untrained(load_config):
            if self.config.exists():
                raise ValueError(f"{self.path}: already holds a run; resume it, or choose another folder")
            raise ValueError(f"{self.path}: expected an absent or empty folder for a new run")

    def unfinished(self, load_config: Callable[[Path], object]) -> bool:
        """Whether the folder holds only a configuration: its run was stopped before the first checkpoint.

        Args:
            load_config: reads config.json; raises ValueError for a file that is no configuration.

        Returns:
            True if it does.
        """
        if self._content() - self._logs() != {self.config}:
            return False
        try:
            load_config(self.config)
        except ValueError:
            return False
        return True

    def untrained(self, load_config: Callable[[Path], object]) -> bool:
        """Whether training ended by an error before its first record: a new run makes all of it again.

        A run that was begun and not yet trained, which has no environment.json, may still belong to a trainer.

        Args:
            load_config: see `unfinished`.

        Returns:
            True if it did.
        """
        # Imported late: it loads torch.
        from . import checkpoint

        needed, content = {self.config, self.environment, self.last}, self._content() - self._logs()
        if not needed <= content <= needed | {self.metrics} or (self.metrics.exists() and self.metrics.stat().st_size):
            return False
        try:
            load_config(self.config)
            return checkpoint.load(self.last)["progress"].get("iteration") == 0
        except ValueError:
            return False

    def remove_untrained(self) -> None:
        """Delete what an `untrained` run leaves beside its configuration; only within `writing`."""
        # In this order: what a kill in between leaves can be begun again, or resumed.
        for path in (self.metrics, self.environment, self.last):
            path.unlink(missing_ok=True)

    def remove_partials(self) -> None:
        """Delete unfinished writes of killed writers; only within `writing`.

        Files of evaluations stay: they are written without the lock.
        """
        for partial in self._partials():
            partial.unlink()

    def record_environment(self) -> None:
        """Append this process to environment.json: a resumed run may move to another machine.

        Raises:
            ValueError: the file is not a list of sessions.
        """
        sessions = read_json(self.environment) if self.environment.exists() else []
        if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
            raise ValueError(f"{self.environment}: not a list of sessions; move the file away to go on without it")
        write_json(self.environment, [*sessions, environment()])

    def _content(self) -> set[Path]:
        return set(self.path.iterdir()) - {self.lock} - set(self._partials())

    def _logs(self) -> set[Path]:
        # A new run goes on with them.
        return {self.tensorboard, self.wandb, self.wandb_id}

    def _partials(self) -> list[Path]:
        return partials((self.config, self.metrics, self.last, self.best, self.curve, self.environment))
