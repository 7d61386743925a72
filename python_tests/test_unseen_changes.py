"""What changes behind a learner's back: its own attributes, and what a forward does besides its output."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from plain_maml import assert_equal_truth, plain_maml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3


def points() -> TaskBatch:
    def examples(count: int) -> Examples:
        y = torch.randint(0, WAYS, (TASKS, count))
        return Examples(torch.randn(TASKS, count, 4, dtype=torch.float64), y)

    return TaskBatch(examples(6), examples(5))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WAYS)).double()


class Calls:
    def __init__(self) -> None:
        self.n = 0


# Generators of the whole process.
DRAWS = {"random": random.random, "numpy": np.random.rand}


class Stateful(nn.Linear):
    """A layer whose outputs depend on how often it was called, or on a draw that is not torch's."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, WAYS, dtype=torch.float64)
        self.kind = kind
        self.array, self.calls, self.nested = np.zeros(1), Calls(), ({"n": [0]},)

    def factor(self) -> float:
        self.array += self.kind == "array"
        self.calls.n += self.kind == "object"
        self.nested[0]["n"][0] += self.kind == "nested"
        count = float(self.array[0]) + self.calls.n + self.nested[0]["n"][0]
        return count + DRAWS.get(self.kind, lambda: 0.0)()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.factor())


REASONS = {
    "array": "its forward sets Stateful.array",
    "object": "its forward sets Stateful.calls",
    "nested": "its forward sets Stateful.nested",
    "random": "its forward draws numbers by random",
    "numpy": "its forward draws numbers by numpy.random",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_forward_that_depends_on_its_calls_or_on_other_draws_goes_task_by_task(kind):
    model, batch = Stateful(kind), points()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    learner = MAML(copy.deepcopy(model), lr=0.1, steps=2)
    result = learner(batch)
    assert learner.route == f"loop: {REASONS[kind]}"
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    alone = MAML(copy.deepcopy(model), lr=0.1, steps=2, route="loop")
    assert torch.equal(result.query_losses, alone(batch).query_losses), "the plan's own forward is undone"
    with pytest.raises(ValueError, match=f"route: .*{REASONS[kind]}"):
        MAML(model, lr=0.1, steps=2, route="vmap")(batch)


class Doubled(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Halving(nn.Linear):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = Doubled.apply(x)
        return super().forward(y + x.mul_(0.5))


def test_planning_leaves_the_examples_as_they_are():
    model, batch = Halving(4, WAYS).double(), points()
    truth = MAML(copy.deepcopy(model), lr=0.1, steps=2, route="loop")(copy.deepcopy(batch)).query_losses
    learner = MAML(model, lr=0.1, steps=2)
    assert torch.equal(learner(batch).query_losses, truth)
    assert learner.route.startswith("loop: torch.func.vmap: ")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("lr", -1.0, ValueError, "lr: expected a finite number"),
        ("steps", 2.5, ValueError, "steps: expected an integer"),
        ("loss", 3, TypeError, "loss: expected a function"),
        ("metric", 3, TypeError, "metric: expected a function"),
        ("model", 3, TypeError, "model: expected a module"),
        ("update", nn.Linear(2, 2), TypeError, "update: expected an Update"),
    ],
)
def test_an_attribute_is_checked_as_the_argument(name, value, error, message):
    learner = MAML(mlp(), lr=0.1, steps=2)
    before = getattr(learner, name)
    with pytest.raises(error, match=message):
        setattr(learner, name, value)
    assert getattr(learner, name) is before


def test_an_update_assigned_later_must_be_of_the_adapted_parameters():
    model, batch = mlp(), points()
    learner = MAML(model, lr=0.1, steps=2)
    with pytest.raises(ValueError, match=r"update: expected factors for parameter '0\.weight' .* made for '2\.bias'"):
        learner.update = KFO(reversed(list(model.named_parameters())))
    update = KFO(model.named_parameters())
    with torch.no_grad():
        for row in update.parameters():
            row.add_(0.1 * torch.randn_like(row))
    learner.update, learner.adapt_update = update, True
    assert torch.equal(
        learner(batch).query_losses, MAML(model, update=update, lr=0.1, steps=2, adapt_update=True)(batch).query_losses
    )
    learner.update = None
    with pytest.raises(ValueError, match="adapt_update: expected an update to adapt"):
        learner(batch)
    learner.adapt_update = False
    assert_equal_truth(learner, batch, plain_maml(copy.deepcopy(model), batch, F.cross_entropy, lr=0.1, steps=2))


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, WAYS)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_anil_takes_body_and_head_of_a_model_assigned_later():
    first, second, batch = Headed().double(), Headed().double(), points()
    learner = ANIL(first, lr=0.1, steps=2)
    learner(batch)
    learner.model = second
    truth = MAML(second, adapted=["head.*"], lr=0.1, steps=2, route="loop")(batch)
    torch.testing.assert_close(learner(batch).query_losses, truth.query_losses, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.5)])
def test_a_module_of_adapted_parameters_with_weights_that_a_hook_makes(hook):
    model, batch = mlp(), points()
    hook(model[0])
    adapted = MAML(model, lr=0.5, steps=3).adapt((batch.support.x[0], batch.support.y[0]))
    x = batch.query.x[0]
    assert torch.equal(adapted.module()(x), adapted.predict(x))


@pytest.mark.parametrize("part", ["support", "query"])
def test_no_example_at_all_is_refused(part):
    batch = points()
    nothing = Examples(*(X[:, :0] for X in batch.support))
    with pytest.raises(ValueError, match=f"batch.{part}: expected at least one example"):
        MAML(mlp(), lr=0.1, steps=1)(batch._replace(**{part: nothing}))
