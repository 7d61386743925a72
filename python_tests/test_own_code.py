"""Functions of this package within `fast_layers`: they run unseen by it, and it has seen what they were given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from kfo_ext import KFO, fast_layers, layers
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")

DOUBLE = torch.float64


class Calls(TorchFunctionMode):
    """Counts what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **kwargs or {})


@pytest.fixture
def network():
    torch.manual_seed(0)
    parts = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    return nn.Sequential(*parts).to(DOUBLE), torch.randn(4, 2, 4, 4, dtype=DOUBLE), torch.tensor([0, 1, 1, 0])


def adapted(network, kfo):
    """The parameters after three steps, whose factors adapt too."""
    model, x, y = network
    params, state = dict(model.named_parameters()), None
    for _ in range(3):
        loss = F.cross_entropy(functional_call(model, params, (x,)), y)
        params, state = kfo.step(loss, params, state, lr=0.3, adapt_update=True)
    return params


def seen_by_fast_layers(monkeypatch, run):
    calls, dispatch = [], layers._FastLayers.__torch_function__

    def counted(self, func, types, args=(), kwargs=None):
        calls.append(func)
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(layers._FastLayers, "__torch_function__", counted)
    with fast_layers():
        return run(), calls


def test_a_step_shows_fast_layers_the_users_calls_alone(monkeypatch, network):
    kfo = KFO(network[0].named_parameters())
    got, calls = seen_by_fast_layers(monkeypatch, lambda: adapted(network, kfo))
    # Of the layers and the loss, in each of three forwards; torch reads a few dimensions beside them.
    names = [getattr(func, "__name__", "") for func in calls]
    assert [names.count(name) for name in ("conv2d", "batch_norm", "cross_entropy")] == [3, 3, 3]
    assert len(calls) <= 3 * 12
    for name, param in adapted(network, kfo).items():
        torch.testing.assert_close(got[name], param, rtol=1e-12, atol=1e-12)


def test_modes_of_the_user_see_what_they_saw(network):
    kfo = KFO(network[0].named_parameters())
    with Calls() as alone:
        adapted(network, kfo)
    with Calls() as outside, fast_layers():
        adapted(network, kfo)
    with fast_layers(), Calls() as inside:
        adapted(network, kfo)
    steps = [func for func in alone.seen if func is torch.autograd.grad]
    for mode in (outside, inside):
        assert [func for func in mode.seen if func is torch.autograd.grad] == steps
    # The innermost mode sees each call itself.
    assert inside.seen == alone.seen


def test_the_block_is_back_after_an_error(monkeypatch, network):
    model, x, y = network
    kfo = KFO(model.named_parameters())

    def run():
        with pytest.raises(ValueError, match="lr"):
            kfo.step(F.cross_entropy(model(x), y), model.parameters(), lr=-1.0)
        model(x)

    _, calls = seen_by_fast_layers(monkeypatch, run)
    assert [getattr(func, "__name__", "") for func in calls].count("conv2d") == 2


@pytest.mark.parametrize("make", [list, dict], ids=["list", "dict"])
def test_activations_among_the_parameters_lie_as_torchs(network, make):
    """A hypernetwork: a layer's output, channels last in memory, is a parameter of the next network."""
    model, x, _ = network
    kfo = KFO([("weight", torch.zeros(4, 3, 2, 2, dtype=DOUBLE))])

    def run():
        weight = F.conv2d(x, model[0].weight)
        params = {"weight": weight} if make is dict else [weight]
        moved, _ = kfo.step(F.max_pool2d(weight, 2).square().sum(), params, lr=0.5)
        moved = moved["weight"] if make is dict else moved[0]
        return weight.is_contiguous(), moved.view(-1), torch.autograd.grad(moved.cos().sum(), model[0].weight)[0]

    expected = run()
    with fast_layers():
        got = run()
    assert got[0] and expected[0]
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-12, atol=1e-12)
