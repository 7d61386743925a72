"""Our classes under learn2learn's names against learn2learn itself, in float64, and what the migration page shows."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from functools import partial

import learn2learn_tests
import pytest
import torch
import torch.nn.functional as F
from deadlines import seconds
from pages import DOCS, examples, run_example
from torch import nn
from torch.func import functional_call
from update_table import randomised

from kfo_ext import KFO, MAML, ByName, Chain, GradientDescent, LowRank, MetaCurvature, MetaSGD
from kfo_ext.interop import learn2learn as ours
from kfo_ext.tasks import Examples, TaskBatch

l2l = ours.light_import()

LR, STEPS = 0.2, 3
PAGE = DOCS / "migrating.md"


class Elementwise(nn.Module):
    """A module of the kind that learn2learn's ModuleTransform makes, which no update of ours stands for."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.5, 1.5, inputs, dtype=torch.float64))

    def forward(self, gradient):
        return torch.tanh(self.rate * gradient)


def kronecker(**options):
    return l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, **options)


# learn2learn's transform, and the one that replaces it here: the same one, or that of kfo_ext.
TRANSFORMS = {
    "kronecker": (kronecker(), ours.KroneckerTransform(ours.KroneckerLinear)),
    "kronecker plain, bias": (
        kronecker(psd=False, bias=True),
        ours.KroneckerTransform(l2l.nn.KroneckerLinear, bias=True, psd=False),
    ),
    "kronecker, theirs": (kronecker(psd=False, bias=True), kronecker(psd=False, bias=True)),
    "curvature": (l2l.optim.MetaCurvatureTransform, ours.MetaCurvatureTransform),
    "curvature, theirs": (l2l.optim.MetaCurvatureTransform, l2l.optim.MetaCurvatureTransform),
    "scale": (lambda p: l2l.nn.Scale(p.shape), ours.gradient_transform(MetaSGD)),
    "hidden": (
        l2l.optim.KroneckerTransform(partial(ours.KroneckerNetwork, hidden_layers=2, scale=3.0), bias=True),
        ours.gradient_transform(KFO, hidden_layers=2, scale=3.0),
    ),
    "module": (l2l.optim.ModuleTransform(Elementwise), l2l.optim.ModuleTransform(Elementwise)),
}
each_transform = pytest.mark.parametrize(("theirs", "mine"), TRANSFORMS.values(), ids=TRANSFORMS)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def network():
    """Parameters of one, two and four dimensions; a layer is used twice, and a bias by two layers."""
    torch.manual_seed(1)
    square, head = nn.Linear(6, 6), nn.Linear(6, 4)
    layers = [nn.Conv2d(2, 3, (2, 3)), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, square, nn.Tanh(), square, nn.Linear(6, 6), head).double()
    model[7].bias = square.bias
    return model


def task(seed, n=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 2, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (n,), generator=generator)


def loss_of(learner, seed):
    x, y = task(seed)
    return F.cross_entropy(learner(x), y)


def meta_loss(learner, tasks=2, steps=STEPS):
    losses = []
    for number in range(tasks):
        clone = learner.clone()
        for _ in range(steps):
            clone.adapt(loss_of(clone, 2 * number))
        losses.append(loss_of(clone, 2 * number + 1))
    return torch.stack(losses).mean()


def shells(update):
    return [(name, torch.empty(shape).double()) for name, shape in zip(update.packing.names, update.packing.shapes)]


def same_numbers(update, theirs):
    """Other numbers than at the start, the same in our ParameterUpdate and in learn2learn's; which holds them then."""
    if update.update is None:
        return theirs
    # Both were made with the same options, and start alike.
    start = ours.from_learn2learn(theirs, shells(update))
    assert start.options() == update.update.options()
    assert all(torch.equal(row, other) for row, other in zip(start.phi, update.update.phi, strict=True))
    randomised(update.update)
    return ours.to_learn2learn(update.update)


def close_gradients(update, theirs):
    """Those of the meta-parameters of our ParameterUpdate, and of learn2learn's."""
    if update.update is None:
        close([p.grad for p in update.parameters()], [p.grad for p in theirs.parameters()])
        return
    gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for into, parameter in zip(gradients.parameters(), theirs.parameters(), strict=True):
            into.copy_(parameter.grad)
    converted = ours.from_learn2learn(gradients, shells(update))
    close([row.grad for row in update.update.phi], [row.detach() for row in converted.phi])


@each_transform
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
def test_gbml_equals_learn2learns(theirs, mine, adapt):
    model = network()
    learner = ours.GBML(model, mine, LR, adapt_transform=adapt)
    other = l2l.algorithms.GBML(copy.deepcopy(model), theirs, LR, adapt_transform=adapt).double()
    other.compute_update = same_numbers(learner.compute_update, other.compute_update)
    got, expected = meta_loss(learner), meta_loss(other)
    close(got, expected)
    got.backward()
    expected.backward()
    close([p.grad for p in model.parameters()], [p.grad for p in other.module.parameters()])
    close_gradients(learner.compute_update, other.compute_update)


ONE_LINE = {
    "KroneckerTransform": (kronecker(), ours.KroneckerTransform(ours.KroneckerLinear)),
    "KroneckerLinear": (kronecker(), l2l.optim.KroneckerTransform(ours.KroneckerLinear)),
    "MetaCurvatureTransform": (l2l.optim.MetaCurvatureTransform, ours.MetaCurvatureTransform),
}


@pytest.mark.parametrize(("theirs", "mine"), ONE_LINE.values(), ids=ONE_LINE)
def test_our_transforms_in_learn2learns_gbml(theirs, mine):
    """The norms of the meta-gradients tell the factors apart, which learn2learn has transposed here and there."""
    found = []
    for transform in (mine, theirs):
        gbml = l2l.algorithms.GBML(network(), transform, LR, adapt_transform=True).double()
        loss = meta_loss(gbml)
        loss.backward()
        norms = sorted(p.grad.norm().item() for p in gbml.compute_update.parameters())
        found.append([loss, torch.tensor(norms), *(p.grad for p in gbml.module.parameters())])
    close(*found)


def test_gbml_in_first_order_and_for_every_clone_anew():
    model = network()
    gbml = ours.GBML(model, ours.KroneckerTransform(ours.KroneckerLinear), LR, adapt_transform=True)
    other = l2l.algorithms.GBML(copy.deepcopy(model), kronecker(), LR, adapt_transform=True).double()
    other.compute_update = same_numbers(gbml.compute_update, other.compute_update)
    found = []
    for learner in (gbml, other):
        clone = learner.clone(first_order=True, adapt_transform=False)
        for seed in range(STEPS):
            clone.adapt(loss_of(clone, seed))
        loss_of(clone, 9).backward()
        found.append([p.grad for p in learner.module.parameters()])
    close(*found)
    found = []
    for learner in (gbml, other):
        clone = learner.clone()
        clone.adapt(loss_of(clone, 0))
        # A clone begins anew: its first step adapts no factors.
        again = clone.clone()
        again.adapt(loss_of(again, 1))
        found.append([p.detach() for p in again.module.parameters()])
    close(*found)
    clone = gbml.clone(first_order=True)
    with pytest.raises(
        ValueError, match=r"^first_order: expected False with adapt_transform.*use kfo_ext.MAML.*first_order=True\)"
    ):
        clone.adapt(loss_of(clone, 0))
    theirs = other.clone(first_order=True)
    theirs.adapt(loss_of(theirs, 0))
    with pytest.raises((RuntimeError, UnboundLocalError)):
        theirs.adapt(loss_of(theirs, 0))


def test_gbml_of_any_update_equals_maml():
    """Rates per step, which it counts, beside factors that it adapts; frozen meta-parameters stay."""
    model = network()
    update = randomised(KFO(model.named_parameters(), per_step=STEPS, hidden_layers=1))
    update.layers[0].L.requires_grad_(False)
    gbml = ours.GBML(model, None, LR, adapt_transform=True, allow_unused=True, compute_update=update)
    meta_loss(gbml, tasks=1).backward()
    found = [p.grad.clone() for p in gbml.parameters() if p.grad is not None]
    gbml.zero_grad()
    support, query = (Examples(*(X[None] for X in task(seed))) for seed in (0, 1))
    MAML(model, update=update, lr=LR, steps=STEPS, adapt_update=True)(TaskBatch(support, query)).loss.backward()
    close(found, [p.grad for p in gbml.parameters() if p.grad is not None])


def test_one_backward_pass_for_an_adapted_step():
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            passes.append(1)
            return g

    body, head = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    model = nn.Sequential(body, l2l.nn.Lambda(Counted.apply), head)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(2, (5,))
    for gbml, expected in (
        (ours.GBML(model, ours.KroneckerTransform(ours.KroneckerLinear), LR, adapt_transform=True), 1),
        (l2l.algorithms.GBML(model, kronecker(), LR, adapt_transform=True).double(), 2),
    ):
        clone = gbml.clone()
        clone.adapt(F.cross_entropy(clone(x), y))
        loss = F.cross_entropy(clone(x), y)
        passes.clear()
        clone.adapt(loss)
        assert len(passes) == expected


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_equals_learn2learns(first_order):
    model = network()
    model[0].bias.requires_grad_(False)
    mine = ours.MAML(model, LR, first_order=first_order, allow_nograd=True)
    other = l2l.algorithms.MAML(copy.deepcopy(model), LR, first_order=first_order, allow_nograd=True)
    assert mine.allow_unused is other.allow_unused is True
    assert mine.append == model.append
    assert mine.state_dict().keys() == other.state_dict().keys()
    got, expected = meta_loss(mine), meta_loss(other)
    close(got, expected)
    got.backward()
    expected.backward()
    assert model[0].bias.grad is None
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), other.module.parameters()) if q.grad is not None]
    close(*zip(*pairs))


def test_clones_of_recurrent_layers_and_of_buffers():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.cell, self.out = nn.BatchNorm1d(3), nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.out(self.cell(self.norm(x)[:, None])[0])[:, 0].repeat(1, 2))

    model = Recurrent().double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    plain = copy.deepcopy(model)
    # functional_call does not put back what a module under two names had.
    model.again = model.out
    clone = ours.MAML(model, LR).clone()
    params = dict(plain.named_parameters())
    for _ in range(2):
        clone.adapt(F.cross_entropy(clone(x), y))
        grads = torch.autograd.grad(
            F.cross_entropy(functional_call(plain, params, x), y), params.values(), create_graph=True
        )
        params = {name: params[name] - LR * grad for name, grad in zip(params, grads)}
    F.cross_entropy(clone(x), y).backward()
    F.cross_entropy(functional_call(plain, params, x), y).backward()
    close(*([p.grad for p in part.parameters()] + list(part.buffers()) for part in (model, plain)))
    assert model.norm.num_batches_tracked == 3
    assert clone.module.again is clone.module.out is not model.out


@each_transform
def test_parameter_update_equals_learn2learns(theirs, mine):
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    parameters = list(model.parameters())
    update = ours.ParameterUpdate(parameters, mine)
    other = same_numbers(update, l2l.optim.ParameterUpdate(parameters, theirs).double())
    flags = {"create_graph": True, "allow_unused": True, "allow_nograd": True}
    wanted = [p for p in parameters if p.requires_grad and p is not model.unused]
    found = []
    for rule in (update, other):
        updates = rule(loss_of(model, 0), parameters, **flags)
        present = [U for U in updates if U is not None]
        assert len(present) == len(wanted) and updates[0] is None
        found.append([*present, *torch.autograd.grad(sum((U * U).sum() for U in present), wanted)])
    close(*found)
    with pytest.raises(ValueError, match=r"allow_nograd=True"):
        update(loss_of(model, 0), parameters)


def test_a_transform_for_some_parameters():
    model = network()
    made = l2l.optim.TransformDictionary(
        {model[7]: ours.gradient_transform(MetaCurvature), model[4].weight: kronecker()}
    )
    mine, other = (library.ParameterUpdate(model.parameters(), made).double() for library in (ours, l2l.optim))
    assert [type(part).__name__ for part in mine.transforms].count("NoneType") == 6
    found = [rule(loss_of(model, 0), list(model.parameters())) for rule in (mine, other)]
    close(*found)


@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 2, 5)], ids=str)
def test_meta_curvature_transform_equals_learn2learns(shape, lr):
    mine, theirs = (make(torch.empty(shape).double(), lr) for make in (ours.MetaCurvatureTransform, l2l_curvature))
    randomised(mine.update)
    ours.meta_curvature_to(l2l.optim.ParameterUpdate([torch.empty(shape)], lambda _: theirs), mine.update.matrices())
    found = []
    for transform in (mine, theirs):
        torch.manual_seed(3)
        G = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        U = transform(G)
        (dG,) = torch.autograd.grad((U * U).sum(), G, create_graph=True)
        found.append([U, dG, *torch.autograd.grad(dG.sin().sum(), G)])
    close(*found)


def l2l_curvature(parameter, lr):
    return l2l.optim.MetaCurvatureTransform(parameter, lr).double()


@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3), (2, 5, 2, 3), (6,), (0, 2, 3)], ids=str)
def test_kronecker_linear_equals_learn2learns(shape, bias, psd):
    mine, theirs = (make(2, 3, bias=bias, psd=psd).double() for make in (ours.KroneckerLinear, l2l.nn.KroneckerLinear))
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (mine, theirs):
        learned = [x, *layer.parameters()]
        y = layer(x)
        first = torch.autograd.grad((y * y).sum(), learned, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), learned)
        found.append([y, *first, *second])
    close(*found)


@each_transform
def test_learnable_optimizer_equals_learn2learns(theirs, mine):
    """Four steps of the model and of its transform; an unused and a frozen parameter stay."""
    models = [network(), network()]
    for model in models:
        model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer = ours.LearnableOptimizer(models[0], mine, LR)
    other = l2l.optim.LearnableOptimizer(models[1], theirs, LR).double()
    if optimizer.update.update is not None:
        other.transforms = same_numbers(optimizer.update, other).transforms_modules
    both = [(*pair, torch.optim.SGD(pair[1].parameters(), 0.3)) for pair in zip(models, (optimizer, other))]
    for seed in range(4):
        for model, metaopt, outer in both:
            metaopt.zero_grad()
            outer.zero_grad()
            loss_of(model, seed).backward()
            outer.step()
            metaopt.step()
    close(*([p.detach() for p in model.parameters()] for model in models))
    assert torch.equal(models[0].unused, torch.ones(3).double())


def test_learnable_optimizer_without_what_learns():
    """Plain gradient descent; frozen parameters stay, and those that the caller holds are left alone."""
    model = network()
    model[0].bias.requires_grad_(False)
    held, plain = list(model.parameters()), copy.deepcopy(model)
    optimizer = ours.LearnableOptimizer(model, ours.gradient_transform(GradientDescent), LR)
    sgd = torch.optim.SGD(plain.parameters(), LR)
    for seed in range(3):
        optimizer.zero_grad(set_to_none=seed == 1)
        sgd.zero_grad()
        loss_of(model, seed).backward()
        loss_of(plain, seed).backward()
        optimizer.step()
        sgd.step()
    close([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])
    assert [p.requires_grad for p in held] == [p.requires_grad for p in plain.parameters()]
    with pytest.raises(ValueError, match=r"^closure: expected None"):
        optimizer.step(lambda: None)


SHAPES = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "head.weight": (5, 2), "head.bias": (5,)}
CONVERTED = {
    "descent": GradientDescent,
    "kfo": KFO,
    "plain": partial(KFO, psd=False),
    "bias": partial(KFO, bias=True),
    "only": partial(KFO, only=["head.*"], psd=False, bias=True),
    "hidden": partial(KFO, hidden_layers=2),
    "hidden scale": partial(KFO, hidden_layers=1, scale=4.0, activation="relu", psd=False),
    "hidden no bias": partial(KFO, hidden_layers=1, activation=torch.sin, bias=False, only=["*.weight"]),
    "curvature": MetaCurvature,
    "meta-sgd": MetaSGD,
}


def named(dtype=torch.float64):
    return [(name, torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", CONVERTED.values(), ids=CONVERTED)
def test_updates_come_back_bit_by_bit(make, dtype):
    update = randomised(make(named(dtype)))
    theirs = ours.to_learn2learn(update)
    again = ours.from_learn2learn(theirs, named(dtype))
    assert type(again) is type(update) and again.options() == update.options()
    assert all(torch.equal(row, other) for row, other in zip(again.phi, update.phi, strict=True))
    back = ours.to_learn2learn(again).state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in theirs.state_dict().items())
    with torch.no_grad():
        for row in update.phi:
            row.zero_()
    assert all(torch.equal(value, back[name]) for name, value in theirs.state_dict().items()), "shares memory"


@pytest.mark.parametrize("make", CONVERTED.values(), ids=CONVERTED)
def test_what_is_converted_computes_the_same(make):
    update = randomised(make(named()))
    theirs, grads = ours.to_learn2learn(update), [X for _, X in named()]
    layers = [None if i is None else theirs.transforms_modules[i] for i in theirs.transforms_indices]
    assert not [layer for layer in layers if isinstance(layer, (ours.GradientTransform, ours.KroneckerLinear))]
    close(update.transform(grads), [G if layer is None else layer(G) for G, layer in zip(grads, layers)])


def test_a_factor_that_is_not_there_becomes_an_identity():
    update = randomised(KFO(named(), max_factor=4, hidden_layers=1))
    again = ours.from_learn2learn(ours.to_learn2learn(update), named())
    grads = [X for _, X in named()]
    close(again.transform(grads), update.transform(grads))
    assert update.factors()[2][0] is None and torch.equal(again.factors()[2][0], torch.eye(5).double())


def test_each_holder_of_transforms_is_read():
    model = network()
    holders = [
        l2l.algorithms.GBML(model, kronecker(bias=True)),
        l2l.optim.ParameterUpdate(model.parameters(), kronecker(bias=True)),
        l2l.optim.LearnableOptimizer(model, kronecker(bias=True)),
    ]
    for holder in holders:
        update = ours.from_learn2learn(holder.double(), model.named_parameters())
        assert type(update) is KFO and update.has_bias
    # Without what is used twice, which its MetaSGD takes apart.
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    rates = l2l.algorithms.MetaSGD(model, lr=0.25)
    with torch.no_grad():
        for rate in rates.lrs:
            rate.mul_(torch.rand_like(rate))
    update = ours.from_learn2learn(rates, model.named_parameters())
    # It reads .grad of tensors that are no leaves.
    warnings.simplefilter("ignore")
    mine, clone = ours.GBML(copy.deepcopy(model), None, 1.0, compute_update=update).clone(), rates.clone()
    for learner in (mine, clone):
        learner.adapt(loss_of(learner, 0))
    close([p.detach() for p in mine.module.parameters()], [p.detach() for p in clone.module.parameters()])


REFUSED = {
    "low rank": (partial(LowRank, rank=1), TypeError, "no counterpart of LowRank, only of GradientDescent, KFO"),
    "chain": (lambda n: Chain(MetaSGD(n), KFO(n)), TypeError, "no counterpart of Chain"),
    "by name": (lambda n: ByName(n, {"*": KFO}), TypeError, "no counterpart of ByName"),
    "rates": (partial(KFO, per_step=2), ValueError, "no counterpart of per_step"),
    "wave": (lambda n: MetaCurvature([("wave", torch.ones(2, 3, 4))]), ValueError, r"'wave' of shape \(2, 3, 4\)"),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_counterpart_is_named(make, error, text):
    with pytest.raises(error, match=f"^update: learn2learn.*{text}"):
        ours.to_learn2learn(make(named()))


def test_what_cannot_be_read_is_named():
    parameters = [X for _, X in named()]

    def theirs(make):
        return l2l.optim.ParameterUpdate(parameters, make).double()

    def read(make, error, text, given=named):
        with pytest.raises(error, match=text):
            ours.from_learn2learn(make if isinstance(make, nn.Module) else theirs(make), given())

    read(nn.Linear(1, 1), TypeError, "^learned: expected learn2learn's ParameterUpdate, GBML.*Linear")
    read(ours.GBML(network(), kronecker()), TypeError, r"^learned: expected.*kfo_ext.*ParameterUpdate")
    read(l2l.optim.ModuleTransform(Elementwise), TypeError, "^learned: expected KroneckerLinear.*Elementwise")
    read(lambda p: l2l.nn.Scale(), ValueError, r"^learned: expected numbers of shape \(4, 3, 2, 2\) for 'conv.weight'")
    read(partial(l2l.optim.MetaCurvatureTransform, lr=0.5), ValueError, "^learned: expected lr=1 in.*got 0.5")
    read(lambda p: kronecker()(p) if p.dim() > 1 else l2l.nn.Scale(p.shape), ValueError, "one kind.*KFO.*MetaSGD")
    read(lambda p: None if p.dim() > 1 else l2l.nn.Scale(p.shape), ValueError, "none for 'conv.weight'.*ByName")
    read(kronecker(), ValueError, "^parameters: expected 4, one per transform of learned, got 3", lambda: named()[1:])
    read(kronecker(), ValueError, "made for another parameter", lambda: [*named()[1:], named()[0]])
    read(kronecker(), TypeError, "^parameters: expected torch.float64", partial(named, torch.float32))


def test_bad_arguments_are_named():
    model = network()
    for call, error, text in (
        (lambda: ours.KroneckerTransform(Elementwise), TypeError, "^kronecker_cls: expected KroneckerLinear, got Elem"),
        (lambda: ours.GBML(model, None), TypeError, "^transform: expected a function from a parameter.*NoneType"),
        (lambda: ours.GBML(model, lambda p: 3), TypeError, "^transform: expected a module or None for '0.weight'"),
        (
            lambda: ours.GBML(model, None, compute_update=l2l.optim.ParameterUpdate(model.parameters(), kronecker())),
            TypeError,
            "^compute_update: expected an Update.*got learn2learn.optim",
        ),
        (lambda: ours.LearnableOptimizer(model.parameters(), kronecker()), TypeError, "^model: expected a module"),
        (lambda: ours.GradientTransform(KFO(model.parameters())), ValueError, "^update: expected one of one parameter"),
        (lambda: ours.GradientTransform(model), TypeError, "^update: expected an Update"),
        (lambda: ours.KroneckerLinear(2, 3)(torch.ones(3, 2)), ValueError, r"^x: expected shape \(\.\.\., 2, 3\) or"),
        (lambda: ours.KroneckerNetwork(2, 3, hidden_layers=0), ValueError, "^hidden_layers: expected at least 1"),
        (lambda: ours.KroneckerNetwork(2, 3, activation="no"), ValueError, "^activation: expected"),
        (lambda: ours.KroneckerNetwork(2, 3, scale=0), ValueError, "^scale: expected"),
        (lambda: ours.gradient_transform(hidden=2)(torch.ones(2)), TypeError, "hidden"),
        (lambda: ours.MAML(model, LR).nothing, AttributeError, "nothing"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_light_import_has_the_algorithms_and_says_what_it_lacks():
    names = {"GBML", "MAML", "MetaSGD", "maml_update", "meta_sgd_update", "LightningMAML"}
    assert names <= set(dir(l2l.algorithms))
    assert {"ParameterUpdate", "LearnableOptimizer", "DifferentiableSGD", "ModuleTransform"} <= set(dir(l2l.optim))
    assert {"KroneckerLinear", "Scale", "PrototypicalClassifier", "SVClassifier"} <= set(dir(l2l.nn))
    assert l2l.__version__ == "0.2.0" and callable(l2l.clone_module) and callable(l2l.detach_module)
    assert not hasattr(l2l, "no_such_name")
    if l2l.__spec__ is None:
        with pytest.raises(AttributeError, match=r"no attribute 'vision' in this light import, because .* failed: \w+"):
            _ = l2l.vision


def test_the_learners_need_no_learn2learn():
    code = """import sys
sys.modules["learn2learn"] = None
import torch
from kfo_ext.interop.learn2learn import GBML, KroneckerLinear, KroneckerTransform, LearnableOptimizer, MAML
transform = KroneckerTransform(KroneckerLinear)
for learner in (GBML(torch.nn.Linear(2, 1), transform, adapt_transform=True), MAML(torch.nn.Linear(2, 1), 0.1)):
    clone = learner.clone()
    for _ in range(2):
        clone.adapt(clone(torch.ones(1, 2)).sum())
LearnableOptimizer(torch.nn.Linear(2, 1), transform).step()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, timeout=seconds(60))
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("number", range(len(examples(PAGE)) if PAGE.is_file() else 0))
def test_the_code_of_the_migration_page_runs(number):
    for library in re.findall(r"^import (torchopt|higher)$", examples(PAGE)[number], flags=re.MULTILINE):
        pytest.importorskip(library)
    run_example(PAGE, number)


@pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not beside the tests")
def test_the_migration_page_has_each_class():
    text = PAGE.read_text()
    for name in ("GBML", "MAML", "ParameterUpdate", "LearnableOptimizer", "KroneckerTransform", "KroneckerLinear"):
        assert re.search(rf"\| `\w+\.{name}\(.*\| `{name}\(", text), name
    assert "| `optim.MetaCurvatureTransform` | `MetaCurvatureTransform` |" in text


@pytest.mark.parametrize("wrong", [None, "fails", "empty", "other class"])
def test_the_run_of_learn2learns_own_tests_counts(tmp_path, capsys, wrong):
    body = {"fails": "self.fail()", "other class": "pass"}.get(wrong, "self.assertTrue({call})")
    calls = {
        "GBML": "l2l.algorithms.GBML(torch.nn.Linear(1, 1), lambda p: None)",
        "MAML": "l2l.algorithms.MAML(torch.nn.Linear(1, 1), 0.1)",
        "KroneckerLinear": "l2l.nn.KroneckerLinear(1, 1)",
    }
    for path, (_, name) in learn2learn_tests.TESTS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        case = "" if wrong == "empty" else f"    def test_it(self):\n        {body.format(call=calls[name])}\n"
        head = "import unittest\nimport torch\nimport learn2learn as l2l\nclass Case(unittest.TestCase):\n    pass\n"
        (tmp_path / path).write_text(head + case)
    own = l2l.algorithms.GBML
    assert learn2learn_tests.run(tmp_path) == (0 if wrong is None else 3)
    assert l2l.algorithms.GBML is own
    assert capsys.readouterr().out.count(": passed" if wrong is None else ": FAILED") == 3
