"""Promises about meta-training: it follows learn2learn's, keeps its memory, and a NaN stays in its task."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from meta_steps import LEARNERS, adam_of, learners, make_batch, make_learner
from torch import nn
from torch.nn.functional import cross_entropy

from kfo_ext import KFO, MAML
from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.trainer.meta_step import MetaStep

WAYS, INNER_RATE, STEPS, RATE = 3, 0.2, 3, 0.01


def make_model(dtype: torch.dtype) -> nn.Sequential:
    # Without batch norm: a bias before it has a gradient of rounding alone, which Adam makes steps of.
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, WAYS)]
    return nn.Sequential(*layers).double().to(dtype)


def separable_batch(seed: int, dtype: torch.dtype) -> TaskBatch:
    """Each class a pattern of its own with noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(2, WAYS, 1, 8, 8, generator=generator, dtype=torch.float64)

    def examples(each: int) -> Examples:
        x = patterns.repeat_interleave(each, 1)
        x = x + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return Examples(x.to(dtype), torch.arange(WAYS).repeat_interleave(each).expand(2, -1))

    return TaskBatch(examples(2), examples(3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-3)], ids=str)
def test_meta_training_follows_learn2learn(dtype, tolerance):
    """Loss curve, weights and factors over 25 outer steps of Adam, from the same start on the same batches."""
    l2l = light_import()
    model, iterations = make_model(dtype), 25
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=False)
    gbml = l2l.algorithms.GBML(copy.deepcopy(model), transform=transform, lr=INNER_RATE, adapt_transform=True).to(dtype)
    kfo = KFO(model.named_parameters(), psd=False).to(dtype)
    kronecker_factors_to(gbml.compute_update, kfo.factors())
    step = MetaStep(learner := MAML(model, update=kfo, lr=INNER_RATE, steps=STEPS, adapt_update=True), adam_of(learner))
    theirs = torch.optim.Adam(gbml.parameters(), lr=RATE, foreach=False)
    curves = [], []
    for number in range(iterations):
        batch = separable_batch(number, dtype)
        curves[0].append(step(batch, RATE).loss.item())
        theirs.zero_grad()
        loss = 0.0
        for x, y, query_x, query_y in zip(*batch.support, *batch.query):
            clone = gbml.clone()
            for _ in range(STEPS):
                clone.adapt(cross_entropy(clone(x), y))
            loss = loss + cross_entropy(clone(query_x), query_y) / 2
        loss.backward()
        theirs.step()
        curves[1].append(loss.item())
    assert sum(curves[1][-5:]) < 0.8 * sum(curves[1][:5]), "nothing was learned"
    assert curves[0] == pytest.approx(curves[1], rel=tolerance)
    # Relative to the largest element: float32 errors of small ones are those of the large.
    pairs = list(zip(model.parameters(), gbml.module.parameters(), strict=True))
    layers = [wrapper.transform for wrapper in gbml.compute_update.transforms_modules]
    for ours, layer in zip(kfo.factors(), layers, strict=True):
        pairs += zip(ours, kronecker_factors(layer.left, layer.right, psd=layer.psd), strict=True)
    for a, b in pairs:
        assert (a - b).abs().max() <= 10 * tolerance * b.abs().max()
    start = make_model(dtype)
    assert any(not torch.allclose(a, b, atol=0.02) for a, b in zip(model.parameters(), start.parameters()))


@pytest.fixture
def counted():
    """Leaves what the process holds already out of `live`: the whole suite's is long to walk."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live() -> tuple[int, int]:
    """How many tensors have come and stayed, and the bytes of their memories, each once."""
    gc.collect()
    # By type: a compilation in this process leaves tensors without memory.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    storages = {X.untyped_storage().data_ptr(): X.untyped_storage().nbytes() for X in tensors if X.device.type == "cpu"}
    return len(tensors), sum(storages.values())


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("kind", "backward"),
    [("maml-psd", True), ("maml-psd", False), ("by-task", True)],
    ids=["trained", "never", "by_task"],
)
def test_memory_is_constant_over_200_outer_steps(kind, backward):
    model = nn.Linear(162, 3).double()
    learner = MAML(
        nn.Sequential(nn.Flatten(), model),
        update=KFO([("1.weight", model.weight), ("1.bias", model.bias)]),
        lr=0.1,
        steps=2,
        **LEARNERS[kind][1],
    )
    step, batch = MetaStep(learner, adam_of(learner)), make_batch(0)

    def outer_step() -> None:
        if backward:
            step(batch, 0.001)
        # A graph of second order that no backward ever consumes.
        learner(batch).loss.item()
        with torch.no_grad():
            learner(batch)

    for _ in range(20):
        outer_step()
    before, memory = live(), resident()
    for _ in range(200):
        outer_step()
    assert live() == before
    assert resident() - memory < 4 << 20


@pytest.mark.usefixtures("counted")
def test_a_kept_graph_would_be_seen():
    batch, learner = make_batch(0), make_learner("maml")
    before = live()
    kept = learner(batch).loss
    count, size = live()
    assert count > before[0]
    del kept
    assert size >= before[1]


@learners
@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_task(kind, part, value):
    """The losses and accuracies of the other tasks are the same bits."""
    learner, clean, task = make_learner(kind), make_batch(0, tasks=3), 1
    x = getattr(clean, part).x.clone()
    x[task, 0, 0, 4, 4] = value
    dirty = clean._replace(**{part: Examples(x, getattr(clean, part).y)})
    others = [0, 2]
    expected, result = learner(clean), learner(dirty)
    assert not result.query_losses[task].isfinite()
    # ANIL's features are of a task's support and query examples together, by one batch norm.
    assert result.support_losses[:, task].isfinite().all() == (part == "query" and kind != "anil")
    assert not result.loss.isfinite()
    assert torch.equal(result.query_losses[others], expected.query_losses[others])
    assert torch.equal(result.support_losses[:, others], expected.support_losses[:, others])
    assert torch.equal(result.metrics[others], expected.metrics[others])


@pytest.mark.parametrize("route", ["auto", "loop"])
def test_degenerate_meta_batches_equal_plain_torch(route):
    """One task, one example, one feature, one output."""
    torch.manual_seed(1)
    model = nn.Linear(1, 1).double()
    x, y, query_x, query_y = torch.randn(4, 1, 1, 1).double()
    batch = TaskBatch(Examples(x, y), Examples(query_x, query_y))
    kfo = KFO(model.named_parameters())
    loss = MAML(model, update=kfo, lr=0.1, steps=1, loss=nn.functional.mse_loss, route=route)(batch).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    w, b = model.weight, model.bias
    inner = torch.autograd.grad((x[0] @ w + b - y[0]).square().mean(), (w, b), create_graph=True)
    w, b = w - 0.1 * inner[0], b - 0.1 * inner[1]
    right = (query_x[0] @ w + b - query_y[0]).square().mean()
    torch.testing.assert_close(loss, right)
    for actual, expected in zip(gradients, torch.autograd.grad(right, list(model.parameters()))):
        torch.testing.assert_close(actual, expected)
