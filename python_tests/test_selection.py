"""What the inner loop adapts: `adapted=` and ANIL's `head=`, against plain torch in float64 and against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_maml import assert_equal_truth, plain_kfo, plain_maml
from torch import nn
from torch.nn.functional import cross_entropy

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.tasks import Examples, TaskBatch

TASKS, WAYS = 3, 4
OPTIONS = {"lr": 0.3, "steps": 3}
routes = pytest.mark.parametrize("route", ["vmap", "loop"])


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Conv2d(3, 2, 2, stride=2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, WAYS))

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def network(norm: nn.Module | None = None) -> Net:
    model = Net(nn.GroupNorm(1, 3) if norm is None else norm).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def batch_of(count: int = 5) -> TaskBatch:
    def examples(count: int) -> Examples:
        x = torch.randn(TASKS, count, 2, 6, 6, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count)))

    return TaskBatch(examples(count), examples(count + 2))


def random_kfo(parameters) -> KFO:
    kfo = KFO(parameters, psd=False)
    for parameter in kfo.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return kfo


def named(model: nn.Module, names) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if name in names]


CHOSEN = {
    "head": (["head.*"], {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}),
    "body": (
        ["body*"],
        {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "body.3.weight", "body.3.bias"},
    ),
    "biases": (["*.bias"], {"body.0.bias", "body.1.bias", "body.3.bias", "head.0.bias", "head.2.bias"}),
    "scattered": (
        ("head.2.weight", "body.0.weight", "*.1.*"),
        {"body.0.weight", "body.1.weight", "body.1.bias", "head.2.weight"},
    ),
}


@routes
@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"checkpoint": True}], ids=str)
@pytest.mark.parametrize("chosen", CHOSEN)
def test_equals_plain_torch(chosen, options, route):
    patterns, names = CHOSEN[chosen]
    model, batch = network(nn.BatchNorm2d(3, track_running_stats=False)), batch_of()
    learner = MAML(model, adapted=patterns, route=route, **OPTIONS, **options)
    assert set(learner.adapted) == names
    first_order = "first_order" in options
    assert_equal_truth(
        learner, batch, plain_maml(model, batch, cross_entropy, only=names, first_order=first_order, **OPTIONS)
    )


@routes
@pytest.mark.parametrize("adapt_update", [False, True])
def test_an_update_of_the_chosen_equals_plain_torch(adapt_update, route):
    patterns, names = CHOSEN["scattered"]
    model, batch = network(), batch_of()
    kfo = random_kfo(named(model, names))
    truth = plain_maml(
        model,
        batch,
        cross_entropy,
        only=names,
        rule=plain_kfo(psd=False),
        phi=list(kfo.phi),
        adapt_update=adapt_update,
        **OPTIONS,
    )
    assert_equal_truth(
        MAML(model, adapted=patterns, update=kfo, adapt_update=adapt_update, route=route, **OPTIONS), batch, truth
    )


@routes
@pytest.mark.parametrize("full", [False, True])
def test_anil_is_maml_that_adapts_the_head(full, route):
    model, batch = network(), batch_of()
    # The update may have been made with the names of the head, or of the model.
    parameters = named(model, CHOSEN["head"][1]) if full else model.head.named_parameters()
    options = {"update": random_kfo(parameters), "adapt_update": True, "route": route, **OPTIONS}
    learners = [MAML(model, adapted=["head.*"], **options), ANIL(model, **options)]
    assert learners[0].adapted == learners[1].adapted
    results = [learner(batch) for learner in learners]
    gradients = [torch.autograd.grad(r.loss, list(each.parameters())) for r, each in zip(results, learners)]
    for a, b in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    adapted = [learner.adapt(batch.support) for learner in learners]
    for name in learners[0].adapted:
        torch.testing.assert_close(*(each.parameters[name] for each in adapted), rtol=1e-9, atol=1e-10)


def test_a_head_of_another_name():
    model = network()
    renamed = copy.deepcopy(model)
    renamed.classifier = nn.ModuleDict({"top": renamed.head})
    del renamed.head
    batch = batch_of()
    learner = ANIL(renamed, head="classifier.top", **OPTIONS)
    assert learner.adapted[0] == "classifier.top.0.weight"
    torch.testing.assert_close(learner(batch).loss, ANIL(model, **OPTIONS)(batch).loss)
    assert learner.route == "vmap"
    assert torch.equal(learner.adapt(batch.support).module(1).state_dict()["body.0.weight"], model.body[0].weight)


@routes
def test_what_is_adapted_afterwards(route):
    """Predictions and modules have the adapted parameters, and the model's own for the rest."""
    model, batch = network(), batch_of()
    adapted = MAML(model, adapted=["head.2.*", "body.0.weight"], route=route, **OPTIONS).adapt(batch.support)
    assert set(adapted.parameters) == {"head.2.weight", "head.2.bias", "body.0.weight"}
    outputs = adapted.predict(batch.query.x)
    for task in range(TASKS):
        module = adapted.module(task)
        torch.testing.assert_close(module(batch.query.x[task]), outputs[task].detach(), rtol=1e-9, atol=1e-10)
        assert torch.equal(module.head[0].weight, model.head[0].weight)
        assert not torch.equal(module.head[2].weight, model.head[2].weight)


def test_frozen_parameters_that_are_not_adapted_need_no_flag():
    model, batch = network(), batch_of()
    model.body[0].weight.requires_grad_(False)
    for learner in (MAML(model, adapted=["head.*"], **OPTIONS), ANIL(model, **OPTIONS)):
        learner(batch).loss.backward()
        # It is no part of what is checked: the rest may be frozen and thawed between calls.
        model.body[3].requires_grad_(False)
        learner(batch)
        model.body[3].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'body\.0\.weight' does not require a gradient; allow_nograd=True"):
        MAML(model, adapted=["body*"], **OPTIONS)


def test_a_tied_parameter_is_chosen_by_all_its_names():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"adapted: 'a\.weight' and 'b\.weight' are one parameter, .* name both"):
        MAML(model, adapted=["b.*"], **OPTIONS)
    assert MAML(model, adapted=["b.*", "a.weight"], **OPTIONS).adapted == ("a.weight", "b.bias")


@pytest.mark.parametrize(
    ("adapted", "error", "message"),
    [
        ("head.*", TypeError, r"adapted: expected a sequence of names or patterns, such as .*, got 'head\.\*'"),
        (lambda name: True, TypeError, "adapted: expected a sequence of names or patterns"),
        ([torch.ones(1)], TypeError, "adapted: expected names or patterns, got Tensor"),
        ([], ValueError, "adapted: expected at least one name or pattern, got none"),
        (["head.*", "tail.*"], ValueError, r"adapted: 'tail\.\*' fits no parameter of the model, which has body\.0"),
    ],
    ids=["a string", "a function", "a tensor", "nothing", "no parameter"],
)
def test_a_choice_that_is_refused(adapted, error, message):
    with pytest.raises(error, match=message):
        MAML(network(), adapted=adapted, **OPTIONS)


def test_updates_for_other_parameters_are_refused():
    model = network()
    for wrong in (model.named_parameters(), named(model, {"head.0.weight", "head.0.bias"})):
        with pytest.raises(ValueError, match="update: expected one made for 4 parameters, got one for"):
            MAML(model, adapted=["head.*"], update=KFO(wrong), **OPTIONS)
    square = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    with pytest.raises(ValueError, match=r"factors for parameter 'b\.weight' .* made for 'c\.weight'"):
        MAML(square, adapted=["b.*"], update=KFO(named(square, {"c.weight", "c.bias"})), **OPTIONS)


def test_anils_arguments_that_are_refused():
    model = network()
    with pytest.raises(TypeError, match=r"submodule named top, got Net with body, head; head= names another one"):
        ANIL(model, head="top", **OPTIONS)
    with pytest.raises(TypeError, match="head: expected the name of a submodule, got Linear"):
        ANIL(model, head=nn.Linear(2, 2), **OPTIONS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepps'"):
        ANIL(model, stepps=3, **OPTIONS)
    model.features = lambda x: (model.body(x),)
    with pytest.raises(TypeError, match=r"model: expected features\(x\) to return a tensor, got tuple"):
        ANIL(model, route="loop", **OPTIONS)(batch_of())
