"""The folder of one run: where its files lie, and how it is made and opened."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kfo_ext

from .files import read_json, remove_partial, write_json


class RunFolder:
    """Paths of a run: config.json, metrics.jsonl, last.pt, best.pt, curve.png, environment.json, eval-*.json.

    path: the folder; `free` and `open` say whether it must hold a run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.curve = self.path / "curve.png"
        self.environment = self.path / "environment.json"

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint best or last."""
        if name not in ("best", "last"):
            raise ValueError(f"checkpoint: expected best or last, got {name!r}")
        return self.path / f"{name}.pt"

    def evaluation(self, split: str, checkpoint: str) -> Path:
        """Path of the scores of one checkpoint on one split."""
        return self.path / f"eval-{split}-{checkpoint}.json"

    @classmethod
    def free(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of a run to be made; nothing is written yet.

        Raises: ValueError if it holds anything already.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ValueError(f"{run.path}: expected a folder for the run, got a file")
        if run.config.exists():
            raise ValueError(f"{run.path}: already holds a run; resume it, or choose another folder")
        if run.path.exists() and any(run.path.iterdir()):
            raise ValueError(f"{run.path}: expected an absent or empty folder for a new run")
        return run

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
        remove_partial(run.path)
        return run

    def record_environment(self) -> None:
        """Append this process to environment.json: a resumed run may move to another machine."""
        sessions = read_json(self.environment) if self.environment.exists() else []
        write_json(self.environment, [*sessions, environment()])


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
