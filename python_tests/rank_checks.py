"""What test_ranks.py starts with torchrun: one rank, which writes what it found to FOLDER/found-SIZE-RANK.pt.

python -m torch.distributed.run ... rank_checks.py FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from meta_steps import adam_of, make_batch, make_learner
from torch import nn

from kfo_ext import ANIL
from kfo_ext.runs import RunFolder
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.trainer import Config, Trainer, evaluate, evaluate_run, loop
from kfo_ext.trainer.meta_step import MetaStep
from kfo_ext.trainer.ranks import joined
from kfo_ext.trainer.recipe import build_family, build_learner

OPTIONS = {
    "dataset": "glyphs", "ways": 2, "shots": 1, "queries": 2, "hidden": 4, "steps": 2, "meta_batch": 5, "accumulate": 2,
    "validation_tasks": 9, "iterations": 20, "validation_every": 10, "dtype": "float64", "clip_norm": 0.5, "threads": 1,
}  # fmt: skip
EVALUATED = {"tasks": 9, "batch": 4}


class Uneven(nn.Module):
    """A model with a feature that only tasks of positive inputs use, and one that no task uses."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.seldom, self.never = (nn.Linear(2, 2, dtype=torch.float64) for _ in range(3))

    def features(self, x):
        return self.seldom(x) if x.min() > 0 else x

    def forward(self, x):
        return self.head(self.features(x))


class Followed(Uneven):
    """A model with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

    def features(self, x):
        return self.norm(x)


def steps(model: nn.Module, batch: TaskBatch, group=None) -> tuple[dict, list]:
    """Parameters after two steps, task by task, and the reports."""
    learner = ANIL(model, lr=0.1, steps=1, route="loop")
    step = MetaStep(learner, adam_of(learner), group=group)
    reports = [step(batch, 0.01) for _ in range(2)]
    return dict(model.state_dict()), [report._asdict() for report in reports]


def uneven_batch() -> TaskBatch:
    torch.manual_seed(3)
    x = torch.randn(5, 4, 2, dtype=torch.float64)
    # The first task alone uses `seldom`: with several ranks some have no gradient of it.
    x[0] = x[0].abs() + 0.1
    x[1:, 0] = -1.0
    examples = Examples(x, torch.randint(2, (5, 4)))
    return TaskBatch(examples, examples)


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def refused(call) -> str:
    """What an error says."""
    try:
        call()
    except (ValueError, ArithmeticError) as error:
        return str(error)
    return ""


def check(folder: Path, group) -> dict:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    here = folder / f"ranks-{size}"
    found = {}
    config = Config(**OPTIONS)

    def train(name: str, **changes) -> Trainer:
        return Trainer(config.changed(**changes), SimpleNamespace(path=here / name), group=group)

    # Refusals, before training and before anything is written.
    found["seed"] = refused(lambda: train("seed", seed=rank // (size - 1)))
    loop.versions = lambda: {"kfo_ext": "1", "torch": "2.9" if rank == 1 else "2.10"}
    found["version"] = refused(lambda: train("version"))
    loop.versions = dict
    real, loop.fingerprint = loop.fingerprint, lambda family: f"data {rank}"
    found["data"] = refused(lambda: train("data"))
    loop.fingerprint = real
    found["few"] = refused(lambda: train("few", meta_batch=size - 1))
    found["device"] = refused(lambda: train("device", device="cuda:0"))
    found["graph"] = refused(lambda: train("graph", device="cuda", cuda_graph=True))
    found["left"] = os.listdir(here) if here.exists() else []

    # Equality, and the same at another number of ranks.
    whole = Trainer.start(config, here / "whole", group=group)
    found["outcome"] = whole.fit()
    found["whole"] = whole.learner.state_dict()
    resumed = Trainer.resume(folder / f"for-{size}", group=group, iterations=20)
    resumed.fit()
    found["resumed"] = resumed.learner.state_dict()
    Trainer.start(config.changed(iterations=10), here / "half", group=group).fit()

    learner, family = build_learner(config), build_family(config, "test", seed=0)
    found["evaluation"] = evaluate(learner, family, **EVALUATED, group=group)._asdict()
    found["none for some"] = evaluate(learner, family, tasks=2, batch=2, group=group)._asdict()
    # The first rank writes the file.
    score = evaluate_run(RunFolder(here / "whole"), tasks=9, group=group)
    found["score"] = score.content

    # A step of one's own.
    found["uneven"] = steps(seeded(Uneven), uneven_batch(), group)
    found["followed"] = refused(lambda: steps(seeded(Followed), uneven_batch(), group))
    found["small"] = refused(lambda: steps(seeded(Uneven), uneven_batch().split(size - 1)[0], group))
    batch = make_batch(0, tasks=5)
    batch.query.x[4] = torch.nan
    step = MetaStep(learner := make_learner(), adam_of(learner), group=group)
    before = [p.clone() for p in learner.parameters()]
    report = step(batch, 0.01)
    found["nan"] = refused(lambda: step.check_finite(report))
    found["kept"] = all(map(torch.equal, before, learner.parameters()))

    # One rank alone is asked to stop.
    endless = Trainer.start(config.changed(iterations=10**6, validation_every=10**5), here / "endless", group=group)
    if rank == size - 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    found["interrupted"] = endless.fit()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    with joined() as joint:
        torch.save(check(place, joint), place / f"found-{dist.get_world_size()}-{dist.get_rank()}.pt")
