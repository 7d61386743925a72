"""Meta-gradients against learn2learn itself, and with KFO instead of its ParameterUpdate."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.interop.learn2learn import (
    RECIPE,
    gradient_transform,
    kronecker_factors,
    kronecker_factors_from,
    kronecker_factors_to,
    light_import,
)
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch

l2l = light_import()

WAYS, LR, TASKS = 3, 0.3, 2
KRONECKER = {psd: l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=psd) for psd in (False, True)}


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def close_factors(got, expected):
    assert len(got) == len(expected)
    for (R, L), (other_R, other_L) in zip(got, expected, strict=True):
        close(R, other_R)
        close(L, other_L)


def network(seed=0):
    """Conv, batch norm on batch statistics, linear, each with weight and bias; 8 channels, 8x8 images."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, WAYS),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def task_batch(seed=1, tasks=TASKS, shots=2, queries=3):
    generator = torch.Generator().manual_seed(seed)

    def examples(each):
        x = torch.rand(tasks, WAYS * each, 1, 8, 8, generator=generator, dtype=torch.float64)
        return Examples(x, torch.arange(WAYS).repeat_interleave(each).expand(tasks, -1).contiguous())

    return TaskBatch(examples(shots), examples(queries))


def random_factors(parameters, seed=2):
    """Non-symmetric factors near the identity: one (R, L) pair per parameter."""
    generator = torch.Generator().manual_seed(seed)

    def factor(n):
        return torch.eye(n, dtype=torch.float64) + 0.2 * torch.randn(n, n, generator=generator, dtype=torch.float64)

    sides = {1: lambda s: (s[0], 1), 2: lambda s: s, 4: lambda s: (s[1], s[2] * s[3])}
    return [tuple(factor(n) for n in sides[p.ndim](p.shape)) for p in parameters]


def our_kfo(model, factors, **options):
    kfo = KFO(model.named_parameters(), **options).double()
    with torch.no_grad():
        for views, values in zip(kfo.factors(), factors, strict=True):
            for view, value in zip(views, values, strict=True):
                view.copy_(value)
    return kfo


def factor_gradients(kfo):
    """One (dR, dL) pair per parameter, whatever the layout of kfo's own parameters."""
    gradients = copy.deepcopy(kfo)
    with torch.no_grad():
        for into, parameter in zip(gradients.parameters(), kfo.parameters(), strict=True):
            into.copy_(parameter.grad)
    return gradients.factors()


def their_gbml(model, factors, *, psd, compute_update=None, **options):
    replaced = {} if compute_update is None else {"compute_update": compute_update}
    gbml = l2l.algorithms.GBML(model, transform=KRONECKER[psd], lr=LR, **options, **replaced).double()
    if compute_update is None:
        kronecker_factors_to(gbml.compute_update, factors)
    return gbml


def their_factor_gradients(update):
    layers = [wrapper.transform for wrapper in update.transforms_modules]
    return [kronecker_factors(layer.left.grad, layer.right.grad, psd=layer.psd) for layer in layers]


def adapt_and_backward(wrapped, batch, steps):
    """learn2learn's meta-training loop, task after task; returns the mean query loss, gradients lie in .grad."""
    total = 0.0
    for x, y, query_x, query_y in zip(*batch.support, *batch.query, strict=True):
        learner = wrapped.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(x), y))
        total = total + F.cross_entropy(learner(query_x), query_y) / len(batch.support.x)
    total.backward()
    return total.detach()


def model_gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_maml_with_kfo_equals_gbml_with_kronecker_transform(steps, psd, adapt):
    model, batch = network(), task_batch()
    factors = random_factors(model.parameters())
    gbml = their_gbml(copy.deepcopy(model), factors, psd=psd, adapt_transform=adapt)
    expected = adapt_and_backward(gbml, batch, steps)

    kfo = our_kfo(model, factors, psd=psd)
    result = MAML(model, update=kfo, lr=LR, steps=steps, adapt_update=adapt)(batch)
    result.loss.backward()

    close(result.loss.detach(), expected)
    close(model_gradients(model), model_gradients(gbml.module))
    close_factors(factor_gradients(kfo), their_factor_gradients(gbml.compute_update))


@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
def test_first_order_with_fixed_factors(psd):
    model, batch = network(), task_batch()
    factors = random_factors(model.parameters())
    gbml = their_gbml(copy.deepcopy(model), factors, psd=psd, first_order=True)
    expected = adapt_and_backward(gbml, batch, steps=3)

    kfo = our_kfo(model, factors, psd=psd)
    result = MAML(model, update=kfo, lr=LR, steps=3, first_order=True)(batch)
    result.loss.backward()

    close(result.loss.detach(), expected)
    close(model_gradients(model), model_gradients(gbml.module))
    close_factors(factor_gradients(kfo), their_factor_gradients(gbml.compute_update))


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_without_an_update(first_order):
    model, batch = network(), task_batch()
    theirs = l2l.algorithms.MAML(copy.deepcopy(model), lr=LR, first_order=first_order)
    expected = adapt_and_backward(theirs, batch, steps=3)

    result = MAML(model, lr=LR, steps=3, first_order=first_order)(batch)
    result.loss.backward()

    close(result.loss.detach(), expected)
    close(model_gradients(model), model_gradients(theirs.module))


def anil_and_backward(model, wrapped_head, batch, steps):
    """The reference's ANIL loop: features of support and query in one forward, the head adapted on the support's."""
    total = 0.0
    for x, y, query_x, query_y in zip(*batch.support, *batch.query, strict=True):
        support, query = model.features(torch.cat([x, query_x])).split([len(x), len(query_x)])
        learner = wrapped_head.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(support), y))
        total = total + F.cross_entropy(learner(query), query_y) / len(batch.support.x)
    total.backward()
    return total.detach()


def small_cnn():
    torch.manual_seed(3)
    return CNN(2, in_channels=1, hidden=8, ways=WAYS, image_size=8, stride=2).double()


def test_anil_equals_maml_on_the_head():
    ours, theirs, batch = small_cnn(), small_cnn(), task_batch()
    expected = anil_and_backward(theirs, l2l.algorithms.MAML(theirs.head, lr=LR), batch, steps=4)

    result = ANIL(ours, lr=LR, steps=4)(batch)
    result.loss.backward()

    close(result.loss.detach(), expected)
    close(model_gradients(ours), model_gradients(theirs))


@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
def test_anil_with_kfo_equals_gbml_on_the_head(adapt):
    ours, theirs, batch = small_cnn(), small_cnn(), task_batch()
    factors = random_factors(ours.head.parameters())
    gbml = their_gbml(theirs.head, factors, psd=True, adapt_transform=adapt)
    expected = anil_and_backward(theirs, gbml, batch, steps=4)

    kfo = our_kfo(ours.head, factors)
    result = ANIL(ours, update=kfo, lr=LR, steps=4, adapt_update=adapt)(batch)
    result.loss.backward()

    close(result.loss.detach(), expected)
    close(model_gradients(ours), model_gradients(theirs))
    close_factors(factor_gradients(kfo), their_factor_gradients(gbml.compute_update))


@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_kfo_as_compute_update_of_gbml(steps, psd, adapt):
    model, batch = network(), task_batch()
    factors = random_factors(model.parameters())
    theirs = their_gbml(copy.deepcopy(model), factors, psd=psd, adapt_transform=adapt)
    expected = adapt_and_backward(theirs, batch, steps)

    kfo = our_kfo(model, factors, psd=psd)
    ours = their_gbml(model, factors, psd=psd, adapt_transform=adapt, compute_update=kfo)
    close(adapt_and_backward(ours, batch, steps), expected)

    close(model_gradients(model), model_gradients(theirs.module))
    close_factors(factor_gradients(kfo), their_factor_gradients(theirs.compute_update))


def test_kfo_as_compute_update_of_gbml_first_order():
    model, batch = network(), task_batch()
    factors = random_factors(model.parameters())
    theirs = their_gbml(copy.deepcopy(model), factors, psd=True, first_order=True)
    expected = adapt_and_backward(theirs, batch, steps=3)

    kfo = our_kfo(model, factors)
    ours = their_gbml(model, factors, psd=True, first_order=True, compute_update=kfo)
    close(adapt_and_backward(ours, batch, steps=3), expected)

    close(model_gradients(model), model_gradients(theirs.module))
    close_factors(factor_gradients(kfo), their_factor_gradients(theirs.compute_update))


@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
def test_a_clone_shows_its_own_adapted_factors(psd):
    model, batch = network(), task_batch()
    factors = random_factors(model.parameters())
    kfo = our_kfo(model, factors, psd=psd)
    theirs = their_gbml(copy.deepcopy(model), factors, psd=psd, adapt_transform=True).clone()
    ours = their_gbml(model, factors, psd=psd, adapt_transform=True, compute_update=kfo).clone()
    for _ in range(3):
        for learner in (theirs, ours):
            learner.adapt(F.cross_entropy(learner(batch.support.x[0]), batch.support.y[0]))

    adapted = ours.compute_update.factors()
    close_factors(adapted, kronecker_factors_from(theirs.compute_update))
    assert not torch.equal(adapted[0][0], factors[0][0])
    close_factors(kfo.factors(), factors)


def test_update_module_reaches_the_factors_of_a_clone():
    model = network()
    factors = random_factors(model.parameters())
    kfo = our_kfo(model, factors)
    clone = l2l.clone_module(kfo)
    l2l.update_module(clone, updates=[torch.ones_like(p) for p in clone.parameters()])
    close_factors(clone.factors(), [(R + 1, L + 1) for R, L in factors])
    close_factors(kfo.factors(), factors)


@pytest.mark.parametrize("create_graph", [False, True])
def test_unused_and_frozen_parameters_have_no_update(create_graph):
    model, batch = network(), task_batch()
    model.register_parameter("unused", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    parameters = list(model.parameters())
    factors = random_factors(parameters)
    update = l2l.optim.ParameterUpdate(parameters, KRONECKER[True]).double()
    kronecker_factors_to(update, factors)
    kfo = our_kfo(model, factors)

    flags = {"create_graph": create_graph, "allow_unused": True, "allow_nograd": True}
    expected, got = (
        rule(F.cross_entropy(model(batch.support.x[0]), batch.support.y[0]), parameters, **flags)
        for rule in (update, kfo)
    )
    assert [u is None for u in got] == [u is None for u in expected]
    assert sum(u is None for u in got) == 2
    close([u for u in got if u is not None], [u for u in expected if u is not None])


def test_gbml_adapts_around_a_frozen_and_an_unused_parameter():
    model, batch = network(), task_batch()
    model.register_parameter("unused", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    factors = random_factors(model.parameters())
    options = {"psd": True, "adapt_transform": True, "allow_unused": True, "allow_nograd": True}
    theirs = their_gbml(copy.deepcopy(model), factors, **options)
    expected = adapt_and_backward(theirs, batch, steps=3)

    kfo = our_kfo(model, factors)
    ours = their_gbml(model, factors, **options, compute_update=kfo)
    close(adapt_and_backward(ours, batch, steps=3), expected)
    trained = [(p.grad, q.grad) for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True)]
    assert [p is None for p, _ in trained] == [q is None for _, q in trained]
    close(*zip(*[pair for pair in trained if pair[0] is not None], strict=True))


def test_without_the_flags_the_parameter_is_named():
    model, batch = network(), task_batch()
    kfo = KFO(model.named_parameters()).double()

    def loss():
        return F.cross_entropy(model(batch.support.x[0]), batch.support.y[0])

    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.bias.*allow_nograd"):
        kfo(loss(), model.parameters())
    model[0].bias.requires_grad_(True)
    unused = [nn.Parameter(p.detach().clone()) if i == 3 else p for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match=r"1\.bias.*allow_unused"):
        kfo(loss(), unused)


def test_kfo_itself_is_no_transform_of_a_learnable_optimizer():
    with pytest.raises(TypeError, match=r"parameters: expected an iterable.*got one Parameter.*gradient_transform\(\)"):
        l2l.optim.LearnableOptimizer(network(), KFO, lr=0.1)
    with pytest.raises(TypeError, match=r"^gradient: expected a tensor, got NoneType"):
        gradient_transform()(nn.Parameter(torch.ones(2)))(None)


@pytest.mark.parametrize("options", [{}, {"psd": False, "hidden_layers": 1, "scale": 3.0}], ids=str)
def test_learnable_optimizer_with_our_transforms(options):
    """One step, and the gradients of the next loss by all factors, against the formula in plain torch."""
    torch.manual_seed(4)
    model = nn.Linear(3, 2).double()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    optimizer = l2l.optim.LearnableOptimizer(model, gradient_transform(**options), lr=LR)
    with torch.no_grad():
        for parameter in optimizer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    F.mse_loss(model(x), y).backward()

    factors = [p.detach().clone().requires_grad_() for p in optimizer.parameters()]
    leaves = [value.clone().requires_grad_() for value in start]
    gradients = torch.autograd.grad(F.mse_loss(F.linear(x, *leaves), y), leaves)
    stepped, at = [], 0
    for value, gradient in zip(start, gradients):
        p, q = (len(value), value.numel() // len(value))
        G = gradient.reshape(p, q)
        if options:
            R, L, b, R2, L2, b2 = factors[at : at + 6]
            hidden = torch.tanh(R.view(p, p).T @ (3 * G) @ L.view(q, q) + b.view(p, q))
            U = G + (R2.view(p, p).T @ hidden @ L2.view(q, q) + b2.view(p, q)) / 3
            at += 6
        else:
            R, L = factors[at].view(p, p), factors[at + 1].view(q, q)
            U = R.T @ R @ G @ L.T @ L
            at += 2
        stepped.append(value - LR * U.reshape(value.shape))
    close([parameter.detach() for parameter in model.parameters()], [value.detach() for value in stepped])
    expected = torch.autograd.grad(F.mse_loss(F.linear(x, *stepped), y), factors)
    close([p.grad for p in optimizer.parameters()], list(expected))


@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
def test_factors_map_the_two_formulas_onto_each_other(psd):
    torch.manual_seed(0)
    theirs = l2l.nn.KroneckerLinear(5, 3, bias=False, psd=psd).double()
    nn.init.normal_(theirs.left)
    nn.init.normal_(theirs.right)
    R, L = kronecker_factors(theirs.left, theirs.right, psd=psd)
    G = torch.randn(4, 5, 3, dtype=torch.float64)
    close(R.mT @ R @ G @ L.mT @ L if psd else R.mT @ G @ L, theirs(G))


@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
def test_factors_copied_there_come_back(psd):
    model = network()
    factors = random_factors(model.parameters())
    update = l2l.optim.ParameterUpdate(model.parameters(), KRONECKER[psd]).double()
    kronecker_factors_to(update, factors)
    close_factors(kronecker_factors_from(update), factors)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    expected = [transform(g) for transform, g in zip(update.transforms_modules, gradients, strict=True)]
    close(our_kfo(model, factors, psd=psd).transform(gradients), expected)


def test_factors_of_another_network_are_refused():
    model = network()
    update = l2l.optim.ParameterUpdate(model.parameters(), KRONECKER[True])
    factors = kronecker_factors_from(update)
    with pytest.raises(ValueError, match=r"expected 10 pairs, .* got 9"):
        kronecker_factors_to(update, factors[:-1])
    factors[4] = (factors[4][0], torch.eye(2))
    with pytest.raises(ValueError, match=r"factors\[4\]: expected L of shape \(9, 9\), got \(2, 2\)"):
        kronecker_factors_to(update, factors)
    other = l2l.optim.ParameterUpdate(model.parameters(), l2l.optim.MetaCurvatureTransform)
    with pytest.raises(TypeError, match="MetaCurvatureTransform"):
        kronecker_factors_from(other)


def test_light_import_says_how_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "learn2learn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install .* learn2learn==0\.2\.0") as caught:
        light_import()
    assert str(caught.value) == RECIPE


def test_light_import_is_learn2learn_itself():
    assert light_import() is l2l is sys.modules["learn2learn"]
    assert l2l.algorithms.GBML.__module__ == "learn2learn.algorithms.gbml"


def test_an_absent_factor_is_an_identity_there():
    model = network()
    parameters = list(model.parameters())
    kfo = KFO(model.named_parameters(), max_factor=8)
    with torch.no_grad():
        for row in kfo.phi:
            row.add_(torch.randn_like(row))
    sides = [side for pair in kfo.factors() for side in pair]
    assert any(side is None for side in sides)
    assert all(pair != (None, None) for pair in kfo.factors())
    update = l2l.optim.ParameterUpdate(parameters, KRONECKER[True]).double()
    kronecker_factors_to(update, random_factors(parameters))
    kronecker_factors_to(update, kfo.factors())
    batch = task_batch()
    theirs, ours = (
        rule(F.cross_entropy(model(batch.support.x[0]), batch.support.y[0]), parameters) for rule in (update, kfo)
    )
    close(ours, theirs)
