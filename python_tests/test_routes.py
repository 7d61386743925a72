"""Routes: one forward of all tasks gives the numbers of one task after the other, whatever the network does."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_maml import assert_equal_truth, plain_maml, right_weight_norm
from torch import nn

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.adapt.routes import LARGEST_TENSOR
from kfo_ext.networks import CNN, cifar_fs_cnn
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3
NETWORKS = {
    "mean": {"in_channels": 1, "image_size": 9, "stride": 2},
    "colour_flat": {"in_channels": 3, "image_size": 6, "mean": False},
    "pooled": {"in_channels": 2, "image_size": 12, "pool": 2, "mean": False},
}
networks = pytest.mark.parametrize("network", NETWORKS)


def cnn(network: str = "mean") -> CNN:
    torch.manual_seed(0)
    model = CNN(2, hidden=5, ways=WAYS, **NETWORKS[network]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_batch(model: CNN, size: int = 9) -> TaskBatch:
    def examples(count: int) -> Examples:
        x = torch.randn(TASKS, count, model.blocks[0].conv.in_channels, size, size, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count)))

    return TaskBatch(examples(6), examples(4))


def both(make, model, batch: TaskBatch) -> list[list[torch.Tensor]]:
    """What a learner gives by vmap and by the loop: loss, losses, accuracies, then every meta-gradient."""
    results = []
    for route in ("vmap", "loop"):
        learner = make(copy.deepcopy(model), route)
        learner.zero_grad()
        result = learner(batch)
        result.loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]
        results.append([*(X.detach() for X in result), *gradients])
    return results


def assert_same(results: list[list[torch.Tensor]]) -> None:
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@networks
@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"checkpoint": True}], ids=["second", "first", "saved"])
@pytest.mark.parametrize("learner", [MAML, ANIL])
def test_equals_one_task_after_the_other(learner, options, network):
    model = cnn(network)
    batch = random_batch(model, NETWORKS[network]["image_size"])

    def make(model, route):
        adapted = model if learner is MAML else model.head
        kfo = KFO(adapted.named_parameters(), psd=True)
        with torch.no_grad():
            for i, parameter in enumerate(kfo.parameters()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        return learner(model, update=kfo, lr=0.1, steps=3, adapt_update=True, route=route, **options)

    assert_same(both(make, model, batch))


def test_evaluation_and_another_loss():
    model = cnn()
    batch = random_batch(model)

    def smooth(output, target):
        return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

    assert_same(both(lambda m, route: MAML(m, lr=0.1, steps=2, loss=smooth, route=route), model, batch))
    with torch.no_grad():
        one, other = (MAML(model, lr=0.1, steps=2, route=route)(batch) for route in ("vmap", "loop"))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b)
    assert not one.loss.requires_grad


class Louder(CNN):
    def forward(self, x):
        return 2 * super().forward(x)


def _set(path: str, value):
    def change(model: CNN) -> CNN:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
        return model

    return change


def _hooked(model: CNN) -> CNN:
    model.blocks[1].conv.register_forward_pre_hook(lambda module, x: None)
    return model


def _shared(first: str, second: str):
    """The second module or parameter is the first one."""

    def change(model: CNN) -> CNN:
        value = model
        for name in first.split("."):
            value = getattr(value, name)
        return _set(second, value)(model)

    return change


def _three_blocks() -> CNN:
    torch.manual_seed(0)
    return CNN(3, hidden=5, ways=WAYS, **NETWORKS["mean"])


def _without_bias(model: CNN) -> CNN:
    model.blocks[0].norm.register_parameter("bias", None)
    return model


def _doubled(path: str):
    """The method gives twice its value, on the instance."""

    def change(model: CNN) -> CNN:
        owner, _, name = path.rpartition(".")
        owner = model.get_submodule(owner)
        method = getattr(owner, name)
        setattr(owner, name, lambda *args: 2 * method(*args))
        return model

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda _: Louder(2, hidden=5, ways=WAYS, **NETWORKS["mean"]),
        _set("blocks.0.norm", nn.GroupNorm(1, 5)),
        _set("blocks.0.norm", nn.BatchNorm2d(5)),
        _set("blocks.0.norm", nn.BatchNorm2d(5, affine=False, track_running_stats=False)),
        _set("blocks.0.conv", nn.Conv2d(1, 5, 3, stride=2, padding=1, padding_mode="circular")),
        _set("blocks.0.conv", nn.Conv2d(1, 5, 3, stride=2, padding=2, dilation=2)),
        _set("blocks.0.conv", nn.Conv2d(1, 5, 3, stride=(2, 1), padding=1)),
        _set("blocks.0.conv", nn.Conv2d(1, 5, 3, padding="same")),
        _set("blocks.1.conv", nn.Conv2d(5, 5, 3, stride=2, padding=1, groups=5)),
        _set("blocks.1.pool", nn.AvgPool2d(2)),
        _set("blocks.1.pool", nn.MaxPool2d(2, stride=1)),
        _set("blocks.1", nn.Identity()),
        _set("head", nn.Linear(5, WAYS, bias=False)),
        _set("head", nn.Sequential(nn.Linear(5, WAYS))),
        _hooked,
        lambda _: _shared("blocks.1", "blocks.2")(_three_blocks()),
        lambda _: _shared("blocks.1.conv", "blocks.2.conv")(_three_blocks()),
        lambda _: _shared("blocks.1.conv.weight", "blocks.2.conv.weight")(_three_blocks()),
        _shared("blocks.0.norm", "blocks.1.norm"),
        _shared("blocks.0.norm.bias", "blocks.1.norm.bias"),
        _shared("blocks.0.norm.bias", "blocks.0.norm.weight"),
        _without_bias,
        _doubled("features"),
        _doubled("blocks.1.forward"),
        _doubled("blocks.0.conv._conv_forward"),
        _doubled("blocks.0.norm.forward"),
    ],
    ids=range(26),
)
def test_a_network_that_was_changed_computes_as_changed(change):
    model = change(cnn()).double()
    batch = random_batch(model)
    for learner, head in ((MAML, False), (ANIL, True)):
        truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2, head=head)
        assert_equal_truth(learner(model, lr=0.1, steps=2, allow_unused=True), batch, truth)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (CNN, "features"),
        (CNN, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Conv2d, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.Linear, "forward"),
        (nn.Sequential, "forward"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize(("learner", "head"), [(MAML, False), (ANIL, True)], ids=["maml", "anil"])
def test_a_class_that_was_changed_computes_as_changed(learner, head, kind, name, monkeypatch):
    model = cnn()
    batch, method = random_batch(model), getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *args: 1.5 * method(self, *args))
    truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2, head=head)
    assert_equal_truth(learner(model, lr=0.1, steps=2), batch, truth)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
@pytest.mark.parametrize(("learner", "head"), [(MAML, False), (ANIL, True)], ids=["maml", "anil"])
def test_hooks_of_all_modules_are_called(learner, head, register):
    model = cnn()
    batch = random_batch(model)

    def double(module, inputs, *output):
        return 2 * (output or inputs)[0] if isinstance(module, (nn.Conv2d, nn.Linear)) else None

    handle = getattr(nn.modules.module, register)(double)
    try:
        truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2, head=head)
        assert_equal_truth(learner(model, lr=0.1, steps=2), batch, truth)
    finally:
        handle.remove()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=str)
def test_a_linear_layer_takes_what_torch_takes(shape):
    torch.manual_seed(0)
    linear = nn.Linear(4, WAYS).double()
    x = torch.randn(TASKS, *shape, dtype=torch.float64)
    y = torch.randn(TASKS, *shape[:-1], WAYS, dtype=torch.float64)
    batch = TaskBatch(Examples(x, y), Examples(x + 1, y))
    mse = nn.functional.mse_loss
    learner = MAML(linear, loss=mse, route="vmap", lr=0.1, steps=2)
    assert_equal_truth(learner, batch, plain_maml(linear, batch, mse, lr=0.1, steps=2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learner(TaskBatch(Examples(x.repeat_interleave(2, -1), y), Examples(x, y)))


@pytest.mark.parametrize(("learner", "head"), [(MAML, False), (ANIL, True)], ids=["maml", "anil"])
def test_frozen_parameters_are_shared_by_all_tasks(learner, head):
    model = cnn()
    for parameter in (model.blocks[0].conv.weight, model.blocks[1].norm.bias):
        parameter.requires_grad_(False)
    batch = random_batch(model)
    truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2, head=head)
    assert_equal_truth(learner(model, lr=0.1, steps=2, allow_nograd=True, route="vmap"), batch, truth)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("route", ["auto", "loop"])
def test_weight_norm_has_right_second_derivatives(route, normed):
    """Those of torch 2.13's own function are wrong."""
    model = cnn()
    normed(model.head)
    batch = random_batch(model)
    with right_weight_norm():
        truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2)
    assert_equal_truth(MAML(model, lr=0.1, steps=2, route=route), batch, truth)


@pytest.mark.parametrize("learner", [MAML, ANIL])
@pytest.mark.parametrize("limit", [1, 2 * 6 * 5 * 25 * 8], ids=["one task", "two tasks"])
def test_groups_of_tasks_equal_all_at_once(limit, learner, monkeypatch):
    model = cnn()
    batch = random_batch(model)
    result = {}
    for name, largest in (("all", 1 << 30), ("groups", limit)):
        monkeypatch.setattr("kfo_ext.adapt.routes.LARGEST_TENSOR", largest)
        adapted = model if learner is MAML else model.head
        maml = learner(model, update=KFO(adapted.named_parameters()), lr=0.1, steps=3, adapt_update=True)
        maml.zero_grad()
        outcome = maml(batch)
        outcome.loss.backward()
        with torch.no_grad():
            evaluated = maml(batch)
        result[name] = [*(X.detach() for X in (*outcome, *evaluated)), *(p.grad.clone() for p in maml.parameters())]
    assert_same(list(result.values()))


def test_tasks_at_once(monkeypatch):
    """As many as keep the largest activation, here of 32 channels, below a bound; the query's, if that is larger."""
    seen = []
    monkeypatch.setattr(MAML, "_group", lambda self, theta, group, *_: seen.append(len(group.support.x)) or _STOP())
    model = cifar_fs_cnn()
    for supports, queries, expected in ((25, 25, 8), (25, 50, 4), (400, 1, 1), (1, 1, 16)):
        seen.clear()
        images = [torch.rand(16, count, 3, 32, 32) for count in (supports, queries)]
        batch = TaskBatch(*(Examples(x, torch.zeros(x.shape[:2], dtype=torch.long)) for x in images))
        with pytest.raises(_Stopped):
            MAML(model, lr=0.1, steps=1)(batch)
        assert seen == [expected], "groups of about the same size"
        assert expected == 16 or max(supports, queries) * 32 * 32 * 32 * 4 * (expected + 3) > LARGEST_TENSOR


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_tasks_at_once_of_long_rows(route, monkeypatch):
    """As many as keep the packed parameters, and those of an adapted update, below the bound."""
    seen = []
    monkeypatch.setattr(MAML, "_group", lambda self, theta, group, *_: seen.append(len(group.support.x)) or _STOP())
    monkeypatch.setattr("kfo_ext.adapt.routes.LARGEST_TENSOR", 5 * (30 * 4 + 4) * 4)
    model = nn.Linear(30, 4)
    batch = TaskBatch(*[Examples(torch.rand(6, 2, 30), torch.zeros(6, 2, dtype=torch.long))] * 2)
    kfo = KFO(model.named_parameters())
    # Factors of 4 + 30 and of 1 + 4 columns: the rows of L are seven times as long as those of the parameters.
    for update, adapt_update, expected in ((None, False, 3), (kfo, False, 3), (kfo, True, 1)):
        seen.clear()
        with pytest.raises(_Stopped):
            MAML(model, update=update, lr=0.1, steps=1, adapt_update=adapt_update, route=route)(batch)
        assert seen == [expected]


class _Stopped(Exception):
    pass


def _STOP():
    raise _Stopped


@pytest.mark.parametrize("change", ["relu_", "exp_", "tanh_"])
@pytest.mark.parametrize("layer", [nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5, track_running_stats=False)])
def test_a_step_is_recomputed_whose_layers_change_their_input_in_place(change, layer):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layer, self.head = nn.Conv2d(1, 5, 3, bias=False), copy.deepcopy(layer), nn.Linear(5, WAYS)

        def forward(self, x):
            return self.head(self.layer(getattr(self.conv(x), change)()).mean((2, 3)))

    torch.manual_seed(0)
    batch = random_batch(cnn())
    assert_same(both(lambda m, route: MAML(m, lr=0.1, steps=2, checkpoint=True, route=route), Net().double(), batch))


WRONG = {
    "an axis twice": lambda m, x: m.head(m.conv(x).mean((2, 2, 3))),
    "an axis out of range": lambda m, x: m.head(m.conv(x).mean((2, 7))),
    "a weight of three dimensions": lambda m, x: nn.functional.linear(
        m.conv(x).mean((2, 3)), m.head.weight.expand(2, -1, -1), m.head.bias
    ),
    "a bias of more rows": lambda m, x: nn.functional.linear(
        m.conv(x).mean((2, 3))[:1], m.head.weight, m.head.bias.expand(4, -1)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused(name):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 5, 3), nn.Linear(5, WAYS)

        def forward(self, x):
            return WRONG[name](self, x)

    model = Net().double()
    batch = random_batch(cnn())
    with pytest.raises((RuntimeError, IndexError)):
        model(batch.support.x[0])
    with pytest.raises((RuntimeError, IndexError)):
        MAML(model, lr=0.1, steps=1)(batch)
