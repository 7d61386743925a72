"""The run of `fixtures/`, which every later version must read: what it is, and how to make it.

    python python_tests/run_fixture.py

writes fixtures/run-VERSION: config.json, metrics.jsonl, best.pt, last.pt, and expected.json with the values that a
reader must find in it. To be called once for a version, before its release; the folder of a released version is never
made again. Made on the CPU, with glyphs: their pixels, and so the identity of the data, are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from kfo_ext.runs import RunFolder, checkpoint
from kfo_ext.runs.metrics import read_metrics
from kfo_ext.trainer import Config, Trainer, evaluate, load_learner
from kfo_ext.trainer.recipe import build_family
from kfo_ext.version import __version__

FOLDER = Path(__file__).parent / "fixtures"
CHECKPOINTS = ("best", "last")
FILES = ("config.json", "metrics.jsonl", "best.pt", "last.pt")
# Both of KFO's kinds of meta-parameters, factors of hidden layers and rates of steps; more iterations than are trained.
OPTIONS: dict[str, Any] = {
    "layers": 1, "hidden": 2, "ways": 2, "shots": 1, "queries": 2, "steps": 2, "inner_lr": 0.4, "meta_batch": 2,
    "hidden_layers": 1, "scale": 8.0, "per_step": True, "validation_tasks": 4, "iterations": 4, "validation_every": 2,
    "threads": 1, "seed": 5,
}  # fmt: skip
TASKS = 8


def parameters_digest(path: Path) -> str:
    """Of the bytes of all the parameters that a checkpoint holds: any machine reads the same."""
    digest = hashlib.sha256()
    for name, value in sorted(checkpoint.load(path)["learner"].items()):
        assert isinstance(value, Tensor)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def losses(run: RunFolder, name: str) -> tuple[int, list[float]]:
    """The iteration of a checkpoint, and its losses on test tasks: accuracies jump where another machine rounds."""
    config, learner, progress = load_learner(run, name)
    return progress.iteration, evaluate(learner, build_family(config, "test", seed=0), tasks=TASKS).losses.tolist()


def continued(run: RunFolder) -> list[dict[str, float]]:
    """The losses of all iterations and validations of the run, which goes on by two iterations for it."""
    Trainer.resume(run.path, iterations=OPTIONS["iterations"] + 2).fit()
    kept = ("iteration", "loss", "validation_loss")
    return [{name: record[name] for name in kept if name in record} for record in read_metrics(run.metrics)]


def main() -> None:
    """Write the folder of this version."""
    target = FOLDER / f"run-{__version__}"
    if target.exists():
        sys.exit(f"{target}: is there already")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        trainer = Trainer.start(Config(**OPTIONS), path)
        trainer.fit()
        target.mkdir(parents=True)
        for name in FILES:
            shutil.copy(path / name, target)
        expected = {
            "parameters": {name: parameters_digest(path / f"{name}.pt") for name in CHECKPOINTS},
            "losses": {name: losses(RunFolder(path), name) for name in CHECKPOINTS},
            "continued": continued(RunFolder(path)),
        }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
