"""What the tests of meta-iterations share: small learners, batches, Adam, and the state to compare."""

from __future__ import annotations

import pytest
import torch

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import MetaStep, make_adam

TASKS, WAYS = 2, 3
LEARNERS = {
    "maml": (MAML, {}, None),
    "maml-plain": (MAML, {}, {}),
    "maml-psd": (MAML, {"adapt_update": True}, {"psd": True, "bias": True}),
    "maml-hidden": (MAML, {"adapt_update": True}, {"psd": False, "hidden_layers": 1}),
    "by-task": (MAML, {"adapt_update": True, "route": "loop"}, {}),
    "first-order": (MAML, {"adapt_update": True, "first_order": True}, {}),
    "anil": (ANIL, {"adapt_update": True}, {}),
}
learners = pytest.mark.parametrize("kind", LEARNERS)
RATES = [0.01, 0.007, 0.003, 0.02]


WAVES = {
    "dataset": "sinusoid", "inner_lr": 0.01, "shots": 2, "queries": 2, "hidden": 4, "steps": 2, "meta_batch": 2,
    "validation_tasks": 4, "iterations": 6, "validation_every": 3, "schedule": "half_life",
    "meta_lr_half_life": 3,
}  # fmt: skip


def make_learner(kind: str = "maml-psd", dtype: torch.dtype = torch.float64, **changes) -> MAML:
    learner, options, update = LEARNERS[kind]
    torch.manual_seed(0)
    model = CNN(2, in_channels=2, hidden=4, ways=WAYS, image_size=9, stride=2).to(dtype)
    adapted = model if learner is MAML else model.head
    kfo = None if update is None else KFO(adapted.named_parameters(), **update)
    if kfo is not None:
        with torch.no_grad():
            for parameter in kfo.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return learner(model, update=kfo, lr=0.1, steps=2, **{**options, **changes})


def make_batch(seed: int, dtype: torch.dtype = torch.float64, tasks: int = TASKS) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def examples(count: int) -> Examples:
        x = torch.rand(tasks, count, 2, 9, 9, generator=generator, dtype=torch.float64).to(dtype)
        return Examples(x, torch.randint(0, WAYS, (tasks, count), generator=generator))

    return TaskBatch(examples(6), examples(5))


def adam_of(learner: MAML, tensor_rate: bool = False) -> torch.optim.Adam:
    adam = make_adam(learner.parameters(), 1.0)
    if tensor_rate:
        # As on CUDA, but float64: the CPU's Adam reads the number itself.
        adam.param_groups[0]["lr"] = torch.tensor(1.0, dtype=torch.float64)
    return adam


def captured(learner: MAML, **options) -> CapturedMetaStep:
    return CapturedMetaStep(learner, adam_of(learner, True), recorder=EagerRecorder(learner), **options)


def state_of(step: MetaStep) -> list[torch.Tensor]:
    adam = step.optimizer.state
    parameters = list(step.learner.parameters())
    return [X.clone() for p in parameters for X in (p.detach(), *(adam[p].values() if p in adam else ()))]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
