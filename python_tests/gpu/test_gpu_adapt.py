"""A whole meta-iteration on the device: by vmap and task by task, against the CPU in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import cifar_fs_cnn, omniglot_cnn
from kfo_ext.tasks import Examples, TaskBatch

pytestmark = pytest.mark.gpu

TASKS, WAYS = 3, 5


def random_batch(channels: int, size: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def examples(count: int) -> Examples:
        x = torch.rand(TASKS, count, channels, size, size, generator=generator, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count), generator=generator))

    return TaskBatch(examples(10), examples(5))


def meta_gradients(learner: type[MAML], model, batch: TaskBatch, route: str) -> list[torch.Tensor]:
    """The loss and the gradients of network and factors, on the CPU."""
    model = copy.deepcopy(model).to(batch.support.x.device)
    update = KFO((model if learner is MAML else model.head).named_parameters())
    maml = learner(model, update=update, lr=0.1, steps=2, adapt_update=True, route=route)
    loss = maml(batch).loss
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() if p.grad is not None else torch.zeros(()) for p in maml.parameters())]


@pytest.mark.parametrize("route", ["auto", "loop"])
@pytest.mark.parametrize("learner", [MAML, ANIL])
@pytest.mark.parametrize("network", ["omniglot", "cifar_fs"])
def test_meta_gradients_equal_the_cpus(device, network, learner, route):
    torch.manual_seed(0)
    make, channels, size = {"omniglot": (omniglot_cnn, 1, 28), "cifar_fs": (cifar_fs_cnn, 3, 32)}[network]
    model, batch = make(2, hidden=8).double(), random_batch(channels, size)
    expected = meta_gradients(learner, model, batch, route="loop")
    for actual, right in zip(meta_gradients(learner, model, batch.to(device), route), expected, strict=True):
        if actual.shape == right.shape:
            torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-9)
        else:
            # A bias that batch norm removes has no gradient at all, or one of zero.
            assert not actual.any()
            assert right.abs().max() < 1e-9 or not right.any()
