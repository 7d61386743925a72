"""An update of one's own, a few lines outside the package, through every learner."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_maml import assert_equal_truth, plain_kfo, plain_maml
from torch import nn
from torch.nn.functional import cross_entropy

from kfo_ext import ANIL, KFO, MAML, GradientDescent, Update
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3


class MetaSGD(Update):
    """A learned rate per element (Li et al. 2017): U(g) = a * g."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters)
        self.a = nn.Parameter(torch.ones(1, self.packing.numel, dtype=torch.float64))

    @property
    def phi(self):
        return (self.a,)

    def rule(self, phi, G):
        return phi[0] * G


class Halving(Update):
    """Learns nothing."""

    phi = ()

    def rule(self, phi, G):
        return 0.5 * G


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten()), nn.Linear(8, WAYS)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def batch() -> TaskBatch:
    def examples() -> Examples:
        x = torch.randn(TASKS, 5, 1, 6, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, 5)))

    return TaskBatch(examples(), examples())


def plain_meta_sgd(phi, gradients):
    pieces = phi[0][0].split([g.numel() for g in gradients])
    return [a.view(g.shape) * g for a, g in zip(pieces, gradients)]


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("adapt_update", [False, True])
@pytest.mark.parametrize(("learner", "head"), [(MAML, False), (ANIL, True)], ids=["maml", "anil"])
def test_meta_sgd_equals_plain_torch(learner, head, adapt_update, route):
    model, tasks = Net().double(), batch()
    update = MetaSGD((model.head if head else model).named_parameters())
    nn.init.uniform_(update.a, 0.5, 1.5)
    options = {"lr": 0.2, "steps": 3, "adapt_update": adapt_update}
    truth = plain_maml(model, tasks, cross_entropy, head=head, rule=plain_meta_sgd, phi=update.phi, **options)
    assert_equal_truth(learner(model, update=update, route=route, **options), tasks, truth)


# The convolution follows gradient descent, and a side of eight has no factor.
SIDES = {"body.0.bias": "RL", "head.weight": "R", "head.bias": "RL"}


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("options", [{}, {"psd": False, "bias": True}, {"hidden_layers": 1}], ids=str)
def test_kfo_of_some_factors_equals_plain_torch(options, route):
    model, tasks = Net().double(), batch()
    update = KFO(model.named_parameters(), only=["*.bias", "head.*"], max_factor=5, **options)
    with torch.no_grad():
        for row in update.phi:
            row.add_(0.3 * torch.randn_like(row))
    plain = plain_kfo(psd=update.psd, bias=update.has_bias, layers=len(update.layers), sides=["", *SIDES.values()])
    for inner in ({"adapt_update": True}, {"first_order": True}):
        inner = {"lr": 0.2, "steps": 3, **inner}
        truth = plain_maml(model, tasks, cross_entropy, rule=plain, phi=update.phi, **inner)
        assert_equal_truth(MAML(model, update=update, route=route, **inner), tasks, truth)


def test_no_update_is_gradient_descent():
    model, tasks = Net().double(), batch()
    truth = plain_maml(model, tasks, cross_entropy, lr=0.2, steps=2)
    for update in (None, GradientDescent(model.named_parameters()), GradientDescent(model.parameters())):
        learner = MAML(model, update=update, lr=0.2, steps=2)
        assert_equal_truth(learner, tasks, truth)
        assert list(learner.state_dict()) == [f"model.{name}" for name in model.state_dict()]
        G = torch.randn(2, learner.packing.numel)
        assert learner.update.rule((), G) is G
    grads = [torch.randn_like(p) for p in model.parameters()]
    assert all(mine is grad for mine, grad in zip(learner.update.transform(grads), grads, strict=True))
    with pytest.raises(ValueError, match=r"grads\['0'\]: expected shape"):
        learner.update.transform([X[:1] for X in grads])
    for update in (None, GradientDescent(model.named_parameters())):
        with pytest.raises(ValueError, match="adapt_update: expected an update to adapt, got GradientDescent, which"):
            MAML(model, update=update, lr=0.2, steps=2, adapt_update=True)


def test_an_update_of_ones_own_says_what_it_was_made_for():
    class Scaled(MetaSGD):
        def options(self):
            return {"scale": 2}

    model = Net().double()
    update = MetaSGD(model.named_parameters())
    for other, message in (
        (MetaSGD((name, p.T) if p.dim() == 2 else (name, p) for name, p in model.named_parameters()), "'head.weight'"),
        (Scaled(model.named_parameters()), "update='Scaled', got update='MetaSGD'"),
        (MetaSGD(model.head.named_parameters()), "of 2 parameters, got 4"),
    ):
        with pytest.raises(ValueError, match=f"state_dict: expected meta-parameters .*{message}"):
            other.load_state_dict(update.state_dict())
    again = Scaled(model.named_parameters())
    again.options = lambda: {"scale": 3}
    with pytest.raises(ValueError, match="scale=3, got scale=2"):
        again.load_state_dict(Scaled(model.named_parameters()).state_dict())


def test_it_meta_trains():
    torch.manual_seed(0)
    model = Net().double()
    learner = MAML(model, update=MetaSGD(model.named_parameters()), lr=0.1, steps=2)
    optimizer, tasks = torch.optim.Adam(learner.parameters(), 0.03), batch()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = learner(tasks).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(learner.update.a, torch.ones_like(learner.update.a))
    state = copy.deepcopy(learner.state_dict())
    again = MAML(Net().double(), update=MetaSGD(model.named_parameters()), lr=0.1, steps=2)
    again.load_state_dict(state)
    assert torch.equal(again(tasks).loss, learner(tasks).loss)


def test_an_update_that_learns_nothing():
    model, tasks = Net().double(), batch()
    truth = plain_maml(model, tasks, cross_entropy, rule=lambda phi, g: [x / 2 for x in g], lr=0.2, steps=2)
    assert_equal_truth(MAML(model, update=Halving(model.named_parameters()), lr=0.2, steps=2), tasks, truth)


def test_in_a_loop_of_ones_own():
    model, update = Net().double(), None
    update = MetaSGD(model.named_parameters())
    x, y = torch.randn(5, 1, 6, dtype=torch.float64), torch.randint(0, WAYS, (5,))
    updates = update(cross_entropy(model(x), y), model.parameters(), create_graph=True)
    gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    for one, other in zip(updates, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_an_update_is_a_subclass_with_a_rule():
    with pytest.raises(TypeError, match="abstract"):
        Update([torch.ones(3)])
    with pytest.raises(TypeError, match=r"update: expected an Update, such as KFO\(.*\), or None, got Linear"):
        MAML(Net(), update=nn.Linear(2, 2), lr=0.1, steps=1)
    assert issubclass(KFO, Update)


class OneNumber(MetaSGD):
    """One number per task, which would spread over all parameters."""

    def rule(self, phi, G):
        return (phi[0] * G).mean(1, keepdim=True)


class OneTask(MetaSGD):
    """One row, which would spread over all tasks."""

    def rule(self, phi, G):
        return (phi[0] * G).mean(0, keepdim=True)


class ListOfOne(MetaSGD):
    def rule(self, phi, G):
        return [phi[0] * G]


class OfItself(MetaSGD):
    """Reads its meta-parameters past the tasks' own."""

    def rule(self, phi, G):
        return self.a * G


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (OneNumber, ValueError, rf"expected shape \({TASKS}, \d+\), as the gradients have, .* got \({TASKS}, 1\)"),
        (OneTask, ValueError, rf"expected shape \({TASKS}, (\d+)\), .* of OneTask, got \(1, \1\)"),
        (ListOfOne, TypeError, "expected a tensor from the rule of ListOfOne, got list"),
        (OfItself, ValueError, "adapt_update: the rule of OfItself does not depend on all of the phi"),
    ],
)
def test_a_rule_of_another_result_is_refused(kind, error, message, route):
    model = Net().double()
    maml = MAML(
        model, update=kind(model.named_parameters()), lr=0.1, steps=2, adapt_update=kind is OfItself, route=route
    )
    with pytest.raises(error, match=message):
        maml(batch())


@pytest.mark.parametrize(
    ("phi", "error", "message"),
    [
        (lambda a: a, TypeError, "expected phi of Own to be a tuple of tensors, got Parameter"),
        (lambda a: (a[0],), ValueError, r"expected phi\[0\] of Own to have shape \(1, n\), got \(\d+,\)"),
        (lambda a: (a, a.sum()), ValueError, r"expected phi\[1\] of Own to have shape \(1, n\), got \(\)"),
    ],
)
def test_meta_parameters_that_are_no_rows_are_refused(phi, error, message):
    class Own(MetaSGD):
        @property
        def phi(self):
            return phi(self.a)

    model = Net().double()
    with pytest.raises(error, match=message):
        MAML(model, update=Own(model.named_parameters()), lr=0.1, steps=2)
