"""`adapt`: predictions, parameters and modules of the adapted model, against plain torch task by task in float64."""

from __future__ import annotations

import pytest
import torch
from plain_maml import call
from torch import nn
from torch.nn.functional import cross_entropy

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.tasks import Examples, TaskBatch

TASKS, WAYS = 3, 4
OPTIONS = {"lr": 0.2, "steps": 2}
routes = pytest.mark.parametrize("route", ["vmap", "loop"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(48, WAYS)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def examples(count: int = 5) -> Examples:
    x = torch.randn(TASKS, count, 1, 6, 6, dtype=torch.float64)
    return Examples(x, torch.randint(0, WAYS, (TASKS, count)))


def adapted_by_hand(model, head: bool, x, y, steps: int) -> list[torch.Tensor]:
    module = model.head if head else model
    parameters = list(module.parameters())
    x = model.features(x) if head else x
    theta = list(parameters)
    for _ in range(steps):
        loss = cross_entropy(call(module, dict(zip(parameters, theta)), x), y)
        theta = [t - 0.2 * g for t, g in zip(theta, torch.autograd.grad(loss, theta, create_graph=True))]
    return theta


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@routes
@pytest.mark.parametrize(("learner", "head"), [(MAML, False), (ANIL, True)], ids=["maml", "anil"])
def test_equals_plain_torch(learner, head, route):
    model = Net().double()
    support, query = examples(), examples(7)
    maml = learner(model, route=route, **OPTIONS)
    result = maml.adapt(support, steps=3)
    predictions = result.predict(query.x)
    assert result.losses.shape == (3, TASKS)
    module = model.head if head else model
    total = 0
    for t in range(TASKS):
        theta = adapted_by_hand(model, head, support.x[t], support.y[t], steps=3)
        named = [(f"head.{name}" if head else name, own) for name, own in module.named_parameters()]
        for value, (name, own) in zip(theta, named, strict=True):
            close(result.parameters[name][t], value)
            assert result.parameters[name].shape == (TASKS, *own.shape)
        x = model.features(query.x[t]) if head else query.x[t]
        expected = call(module, dict(zip(module.parameters(), theta)), x)
        close(predictions[t], expected)
        close(result.module(t)(query.x[t]), expected)
        one = maml.adapt((support.x[t], support.y[t]), steps=3)
        close(one.predict(query.x[t]), expected)
        assert one.losses.shape == (3,)
        shapes = {name: own.shape for name, own in named}
        assert {name: X.shape for name, X in one.parameters.items()} == shapes
        total = total + expected.square().sum()
    # A loss of one's own on the predictions is a meta-loss.
    learned = list(model.parameters())
    actual = torch.autograd.grad(predictions.square().sum(), learned)
    for a, b in zip(actual, torch.autograd.grad(total, learned), strict=True):
        close(a, b)


@routes
def test_the_query_loss_of_forward_is_that_of_the_predictions(route):
    model, batch = Net().double(), TaskBatch(examples(), examples())
    maml = MAML(model, update=KFO(model.named_parameters()), adapt_update=True, route=route, **OPTIONS)
    result, adapted = maml(batch), maml.adapt(batch.support)
    close(adapted.losses, result.support_losses)
    losses = [cross_entropy(output, y) for output, y in zip(adapted.predict(batch.query.x), batch.query.y)]
    close(torch.stack(losses), maml(batch).query_losses)


@routes
def test_without_gradients_nothing_is_kept(route):
    model, support = Net().double(), examples()
    before = {name: value.clone() for name, value in model.named_parameters()}
    maml = MAML(model, route=route, **OPTIONS)
    with torch.no_grad():
        adapted = maml.adapt(support)
    assert not any(X.requires_grad for X in adapted.parameters.values())
    close(adapted.predict(support.x).detach(), maml.adapt(support).predict(support.x).detach())
    module = adapted.module(1)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not any(torch.equal(value, before[name]) for name, value in module.named_parameters() if "head" in name)


@routes
def test_without_steps_it_is_the_model_as_it_is(route):
    model, support = Net().double(), examples()
    adapted = MAML(model, route=route, **OPTIONS).adapt(support, steps=0)
    close(adapted.predict(support.x), torch.stack([model(x) for x in support.x]))
    assert adapted.losses.shape == (0, TASKS)


@routes
@pytest.mark.parametrize(("learner", "head"), [(MAML, False), (ANIL, True)], ids=["maml", "anil"])
def test_evaluation_with_other_steps_and_shots(learner, head, route):
    model = Net().double()
    options = {"update": KFO((model.head if head else model).named_parameters()), "adapt_update": True, "route": route}
    maml, batch = learner(model, **options, **OPTIONS), TaskBatch(examples(3), examples(4))
    maml(TaskBatch(examples(6), examples(2))).loss.backward()
    for steps in (0, 1, 4):
        result = maml(batch, steps=steps)
        assert result.support_losses.shape == (steps, TASKS)
        if steps:
            expected = learner(model, lr=OPTIONS["lr"], steps=steps, **options)(batch)
            assert all(torch.equal(a, b) for a, b in zip(result, expected))
        with torch.no_grad():
            close(maml(batch, steps).query_losses, result.query_losses)
    as_it_is = torch.stack([cross_entropy(model(x), y) for x, y in zip(*batch.query)])
    close(MAML(model, **OPTIONS)(batch, steps=0).query_losses, as_it_is.detach())
    with pytest.raises(ValueError, match="steps: expected an integer of at least 0, got True"):
        maml(batch, steps=True)


def test_a_head_tied_to_the_body_is_untied_in_a_module():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head.weight = self.body.weight

        def features(self, x):
            return torch.tanh(self.body(x))

        def forward(self, x):
            return self.head(self.features(x))

    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 4, (5,))
    adapted = ANIL(Tied().double(), **OPTIONS).adapt((x, y))
    close(adapted.module()(x), adapted.predict(x))


def test_outputs_that_are_no_tensor():
    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    maml = MAML(Named(4, WAYS).double(), loss=lambda o, y: cross_entropy(o["logits"], y), **OPTIONS)
    x, y = torch.randn(TASKS, 5, 4, dtype=torch.float64), torch.randint(0, WAYS, (TASKS, 5))
    assert [output["logits"].shape for output in maml.adapt(Examples(x, y)).predict(x)] == [(5, WAYS)] * TASKS
    assert maml.adapt((x[0], y[0])).predict(x[0])["logits"].shape == (5, WAYS)


def test_what_is_refused():
    model, support = Net().double(), examples()
    maml = MAML(model, **OPTIONS)
    for wrong in ([support.x, support.y], support.x, (support.x,), (support.x[0], None, 1)):
        with pytest.raises(TypeError, match=r"support: expected \(x, y\) of one task or Examples\(x, y\) of several"):
            maml.adapt(wrong)
    with pytest.raises(ValueError, match="steps: expected an integer of at least 0, got -1"):
        maml.adapt(support, steps=-1)
    adapted = maml.adapt(support)
    with pytest.raises(ValueError, match=r"x: expected \(3 tasks, examples, ...\), got shape \(2, 5, 1, 6, 6\)"):
        adapted.predict(support.x[:2])
    with pytest.raises(TypeError, match=r"^x: expected torch\.float64 as the .* got torch\.float32; \.to\("):
        maml.adapt(examples()).predict(examples().x.float())
    with pytest.raises(TypeError, match=r"^support\.x: expected torch\.float64 as the .* got torch\.float32"):
        maml.adapt(Examples(examples().x.float(), examples().y))
    x, y = (X[0].numpy() for X in examples())
    with pytest.raises(TypeError, match=r"support\.x: expected a tensor, got ndarray; torch\.as_tensor"):
        maml.adapt((x, y))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        adapted.predict([1])
    for wrong in (3, -1, 0.0, True):
        with pytest.raises(IndexError, match=f"task: expected 0 to 2, got {wrong}"):
            adapted.module(wrong)
