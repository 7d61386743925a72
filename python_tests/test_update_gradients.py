"""The meta-gradients of every update in every learner against autograd, task by task; rates per step; learn2learn."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from plain_maml import assert_equal_truth, measured, plain_maml
from torch import nn
from torch.nn.functional import cross_entropy
from update_network import TASKS, WAYS, batch, network
from update_table import SHAPES, STEPS, UPDATES, Case, randomised

from kfo_ext import ANIL, KFO, MAML, Chain, GradientDescent, MetaCurvature, MetaSGD, Update
from kfo_ext.interop.learn2learn import light_import, meta_curvature_from, meta_curvature_to
from kfo_ext.tasks import Examples, TaskBatch

LR = 0.2


def adapted_of(model: nn.Module, learner: str) -> list[str]:
    heads = {"maml": (True, False), "anil": (True,), "boil": (False,)}[learner]
    return [name for name, _ in model.named_parameters() if name.startswith("head.") in heads]


def learned(case: Case, model: nn.Module, names: list[str]) -> Update:
    return randomised(case.make([(name, p) for name, p in model.named_parameters() if name in names]))


def make_learner(kind: str, model: nn.Module, update: Update, **options) -> MAML:
    if kind == "anil":
        return ANIL(model, update=update, lr=LR, **options)
    return MAML(model, adapted=None if kind == "maml" else adapted_of(model, kind), update=update, lr=LR, **options)


OPTIONS = {
    "one step": {"steps": 1},
    "three steps": {"steps": STEPS},
    "first order": {"steps": STEPS, "first_order": True},
    "adapted": {"steps": STEPS, "adapt_update": True},
}


# Without the patterns of the head, which a body does not have, and an update that has nothing to adapt.
POINTS = [
    (name, kind, option)
    for name in UPDATES
    for kind in ("maml", "anil", "boil")
    for option in OPTIONS
    if (kind, " only" in name) != ("boil", True) and (name, option) != ("gradient descent", "adapted")
]


@pytest.mark.parametrize(("name", "kind", "option"), POINTS)
def test_meta_gradients_equal_plain_torch(name, kind, option):
    case, model, tasks, options = UPDATES[name], network(), batch(), OPTIONS[option]
    names = adapted_of(model, kind)
    update = learned(case, model, names)
    truth = plain_maml(
        model,
        tasks,
        cross_entropy,
        lr=LR,
        head=kind == "anil",
        only=names if kind == "boil" else None,
        rule=case.plain(update),
        phi=update.phi,
        **options,
    )
    assert_equal_truth(make_learner(kind, model, update, **options), tasks, truth)


PER_STEP = [name for name in UPDATES if name.endswith("per step")]


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("name", [*PER_STEP, "low rank", "meta-curvature"])
def test_checkpointed_steps_are_the_same(name, route):
    model, tasks = network(), batch()
    update = learned(UPDATES[name], model, list(SHAPES))
    options = {"steps": STEPS, "adapt_update": True, "route": route}
    expected, got = (
        measured(make_learner("maml", model, update, checkpoint=checkpoint, **options), tasks)
        for checkpoint in (False, True)
    )
    torch.testing.assert_close(got[3], expected[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PER_STEP)
def test_more_steps_than_have_rates_are_refused(name):
    model, tasks = network(), batch()
    update = learned(UPDATES[name], model, list(SHAPES))
    learner = make_learner("maml", model, update, steps=STEPS)
    support = (tasks.support.x[0], tasks.support.y[0])
    calls = []

    def loss(output, target):
        calls.append(1)
        return cross_entropy(output, target)

    more = make_learner("maml", model, update, steps=STEPS + 1, loss=loss)
    for call in (lambda: more(tasks), lambda: learner.adapt(support, 5)):
        with pytest.raises(ValueError, match=r"step: expected 0 to 2, got [34]: .* for 3 inner steps; .*per_step"):
            call()
    # Nothing was computed in vain.
    assert not calls
    # Fewer have their own as they are.
    for steps in range(STEPS):
        learner.adapt(support, steps)
    grads = [p.detach() for p in model.parameters()]
    G = torch.cat([grad.reshape(1, -1) for grad in grads], 1)
    for call in (lambda: update.transform(grads), lambda: update.rule(update.phi, G)):
        with pytest.raises(ValueError, match=r"step: expected 0 to 2, since .*3 inner steps, got None: pass step"):
            call()
    with pytest.raises(ValueError, match="step: expected 0 to 2, got -1"):
        update.transform(grads, step=-1)
    with pytest.raises(TypeError, match=r"step: expected an integer, got 1\.0"):
        update.transform(grads, step=1.0)


def test_rates_take_their_turns_in_a_loop_of_ones_own():
    """Each step's update is its own rates times the gradients, and each step's rates have a meta-gradient."""
    model, tasks = network(), batch()
    update = learned(UPDATES["gradient descent per step"], model, list(SHAPES))
    x, y = tasks.support.x[0], tasks.support.y[0]
    theta = {name: p.detach() for name, p in model.named_parameters()}
    for step in range(STEPS):
        theta = {name: p.requires_grad_() if p.is_leaf else p for name, p in theta.items()}
        loss = cross_entropy(torch.func.functional_call(model, theta, x), y)
        updates = update(loss, theta, create_graph=True, step=step)
        theta = {name: p - LR * updates[name] for name, p in theta.items()}
    cross_entropy(torch.func.functional_call(model, theta, x), y).backward()
    loop = update.rates.row.grad.clone()
    update.zero_grad()
    learner = make_learner("maml", model, update, steps=STEPS)
    learner(TaskBatch(*(Examples(x[None], y[None]) for _ in range(2)))).loss.backward()
    torch.testing.assert_close(loop, update.rates.row.grad, rtol=1e-10, atol=1e-12)
    assert (loop.abs() > 1e-6).all()


def test_an_update_of_ones_own_with_steps():
    class Warm(Update):
        """A learned rate for each of two steps, in a few lines."""

        steps = 2

        def __init__(self, parameters) -> None:
            super().__init__(parameters)
            self.r = nn.Parameter(torch.tensor([[1.0, 0.5]], dtype=torch.float64))

        @property
        def phi(self):
            return (self.r,)

        def rule(self, phi, G, step=None):
            return phi[0][:, step, None] * G

    model, tasks = network(), batch()
    update = Warm(model.named_parameters())
    rules = [lambda phi, grads, step=step: [phi[0][0, step] * g for g in grads] for step in range(2)]
    truth = plain_maml(model, tasks, cross_entropy, lr=LR, steps=2, rule=rules, phi=update.phi)
    assert_equal_truth(make_learner("maml", model, update, steps=2), tasks, truth)
    chain = Chain(update, MetaSGD(model.named_parameters()))
    with pytest.raises(ValueError, match="step: expected 0 to 1, got 2"):
        make_learner("maml", model, chain, steps=3)(tasks)


@pytest.mark.parametrize("make", [GradientDescent, MetaSGD, KFO])
def test_bad_numbers_of_steps(make):
    model = network()
    for value, error in ((True, TypeError), (2.0, TypeError), (0, ValueError), (-1, ValueError)):
        with pytest.raises(error, match=f"per_step: expected the number of inner steps, .*got {value}"):
            make(model.named_parameters(), per_step=value)
    rates = make(model.named_parameters(), per_step=2)
    with pytest.raises(ValueError, match="state_dict: expected meta-parameters with per_step=2, got per_step=3"):
        rates.load_state_dict(make(model.named_parameters(), per_step=3).state_dict())
    with pytest.raises(ValueError, match="per_step=None, got per_step=2"):
        make(model.named_parameters()).load_state_dict(rates.state_dict())


l2l = light_import()


def their_gradients(wrapped, tasks: TaskBatch, steps: int) -> torch.Tensor:
    """learn2learn's own loop; the mean query loss, gradients lie in .grad."""
    total = 0.0
    for x, y, query_x, query_y in zip(*tasks.support, *tasks.query, strict=True):
        learner = wrapped.clone()
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(x), y))
        total = total + cross_entropy(learner(query_x), query_y) / TASKS
    total.backward()
    return total.detach()


class Images(nn.Module):
    """Parameters of one, two and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.head = nn.Conv2d(3, 4, (2, 3)), nn.Linear(16, 5), nn.Linear(5, WAYS)

    def forward(self, x):
        return self.head(self.body(self.conv(x).tanh().flatten(1)).tanh())


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"adapt_update": True}], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_curvature_equals_learn2learn(steps, options):
    model, tasks = Images().double(), batch()
    update = randomised(MetaCurvature(model.named_parameters()))
    theirs = {"adapt_transform": True} if "adapt_update" in options else options
    gbml = l2l.algorithms.GBML(copy.deepcopy(model), l2l.optim.MetaCurvatureTransform, lr=LR, **theirs).double()
    meta_curvature_to(gbml.compute_update, update.matrices())
    expected = their_gradients(gbml, tasks, steps)
    result = MAML(model, update=update, lr=LR, steps=steps, **options)(tasks)
    result.loss.backward()
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(result.loss.detach(), expected)
    close([p.grad for p in model.parameters()], [p.grad for p in gbml.module.parameters()])
    gradients = copy.deepcopy(update)
    with torch.no_grad():
        for into, row in zip(gradients.phi, update.phi):
            into.copy_(row.grad)
        for p in gbml.compute_update.parameters():
            p.copy_(p.grad)
    mine, other = gradients.matrices(), meta_curvature_from(gbml.compute_update)
    assert [len(M) for M in mine] == [len(M) for M in other]
    for M, N in zip(mine, other):
        close(list(M), list(N))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_sgd_equals_learn2learn(steps, first_order):
    model, tasks = network(), batch()
    update = learned(UPDATES["meta-sgd"], model, list(SHAPES))
    rates = [LR * a.detach() for a in update.packing.unpack(update.a, batched=False)]
    theirs = l2l.algorithms.MetaSGD(
        copy.deepcopy(model), lrs=nn.ParameterList(map(nn.Parameter, rates)), first_order=first_order
    )
    expected = their_gradients(theirs, tasks, steps)
    result = MAML(model, update=update, lr=LR, steps=steps, first_order=first_order)(tasks)
    result.loss.backward()
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(result.loss.detach(), expected)
    close([p.grad for p in model.parameters()], [p.grad for p in theirs.module.parameters()])
    mine = update.packing.unpack(update.a.grad, batched=False)
    close(mine, [LR * rate.grad for rate in theirs.lrs])


@pytest.mark.parametrize("name", [name for name in UPDATES if name not in PER_STEP])
def test_as_compute_update_of_gbml(name):
    """What learn2learn clones and adapts has the meta-gradients of our learner."""
    model, tasks = network(), batch()
    update = learned(UPDATES[name], model, list(SHAPES))
    adapted = bool(update.phi)
    result = MAML(model, update=update, lr=LR, steps=2, adapt_update=adapted)(tasks)
    expected = torch.autograd.grad(result.loss, [*model.parameters(), *update.phi])
    gbml = l2l.algorithms.GBML(model, transform=None, lr=LR, adapt_transform=adapted, compute_update=update)
    loss = their_gradients(gbml, tasks, 2)
    torch.testing.assert_close(loss, result.loss.detach(), rtol=1e-10, atol=1e-10)
    found = tuple(p.grad for p in (*model.parameters(), *update.phi))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_matrices_copied_to_learn2learn_come_back():
    model = Images().double()
    update = randomised(MetaCurvature(model.named_parameters()))
    theirs = l2l.optim.ParameterUpdate(model.parameters(), l2l.optim.MetaCurvatureTransform).double()
    meta_curvature_to(theirs, update.matrices())
    again = MetaCurvature(model.named_parameters())
    with torch.no_grad():
        for mine, other in zip(again.matrices(), meta_curvature_from(theirs)):
            for into, value in zip(mine, other):
                into.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(again.phi, update.phi))
    matrices = update.matrices()
    with pytest.raises(ValueError, match="matrices: expected 6 tuples, one per parameter of update, got 5"):
        meta_curvature_to(theirs, matrices[:-1])
    with pytest.raises(ValueError, match=r"matrices\[2\]: expected shapes \[\(5, 5\), \(16, 16\)\], got \[\(5, 5\)\]"):
        meta_curvature_to(theirs, [*matrices[:2], matrices[2][:1], *matrices[3:]])
    kronecker = l2l.optim.ParameterUpdate(model.parameters(), l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear))
    with pytest.raises(TypeError, match="expected MetaCurvatureTransform, got ReshapedTransform"):
        meta_curvature_from(kronecker)
