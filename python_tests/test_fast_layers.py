"""kfo_ext.fast_layers: the numbers, derivatives and side effects of torch's layers, which run where it cannot."""

from __future__ import annotations

import copy
import random
import threading
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from layer_spy import Spy
from plain_maml import call
from torch import nn
from torch.overrides import TorchFunctionMode

import kfo_ext
from kfo_ext import fast_layers, layers
from kfo_ext.interop.learn2learn import gradient_transform, light_import
from kfo_ext.ops import library
from kfo_ext.ops.batch_norm import reference

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")

DOUBLE = torch.float64


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def draw(*shape, dtype=DOUBLE, **options):
    return torch.randn(*shape, dtype=dtype, **options)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def operators(run):
    """What `run` returns, and how often it called each of our operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return result, {
        event.key.removeprefix("kfo_ext::"): event.count
        for event in profile.key_averages()
        if event.key.startswith("kfo_ext::")
    }


class Block(nn.Module):
    """Of random parts, as users write them."""

    def __init__(self, rng, inputs, outputs):
        super().__init__()
        kernel = rng.choice([1, 3, (3, 1), 2])
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=rng.choice([1, 1, 2, (2, 1)]),
            padding=rng.choice([0, 1, (1, 1), "valid"]),
            dilation=rng.choice([1, 1, 1, 2]) if kernel in (1, 2) else 1,
            groups=rng.choice([1, 1, 1, 2]) if inputs % 2 == 0 else 1,
            bias=rng.random() < 0.7,
            padding_mode=rng.choice(["zeros", "zeros", "zeros", "circular"]),
        )
        if self.conv.padding_mode == "circular" and self.conv.padding == "valid":
            self.conv.padding_mode = "zeros"
        options = rng.choice([{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}])
        self.norm = rng.choice([nn.BatchNorm2d(outputs, **options)] * 4 + [nn.GroupNorm(2, outputs), nn.Identity()])
        self.relu = rng.choice(
            [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, lambda x: x.relu(), nn.Tanh()]
        )
        self.pool = rng.choice([nn.Identity()] * 3 + [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0)])
        self.residual = rng.choice(["", "", "add", "in place", "twice", "pre-activation"])

    def forward(self, x):
        x = self.pool(x) if min(x.shape[2:]) > 5 else F.interpolate(x, (6, 7))
        y = self.norm(self.conv(x))
        if self.residual == "add":
            return self.relu(y + y.mean((2, 3), keepdim=True))
        if self.residual == "in place":
            y += y.detach().abs()
            return self.relu(y)
        if self.residual == "twice":
            return y.tanh() + self.relu(y.clone()) + F.relu(y)
        if self.residual == "pre-activation":
            return F.relu(y) * torch.sigmoid(y)
        return self.relu(y)


class Network(nn.Module):
    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        widths = [3, *(rng.choice([2, 4, 6]) for _ in range(rng.choice([1, 2, 3])))]
        self.blocks = nn.ModuleList([Block(rng, *pair) for pair in pairwise(widths)])
        shared = Block(rng, widths[-1], widths[-1])
        self.blocks.extend([shared] * rng.choice([0, 1, 2]))
        self.head = nn.Linear(widths[-1], 3)
        self.pooled = rng.choice(["mean", "view", "adaptive", "max"])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        if self.pooled == "view":
            x = x.view(len(x), x.size(1), -1).sum(2)
        elif self.pooled == "adaptive":
            x = F.adaptive_avg_pool2d(x, 1).view(len(x), -1)
        else:
            x = x.mean((2, 3)) if self.pooled == "mean" else x.amax((2, 3))
        return self.head(x)


def adapt_and_differentiate(model, x, y, query, create_graph=True):
    """An inner step and its derivatives: losses, and the gradients of both orders."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    adapted = [parameter - 0.3 * grad for parameter, grad in zip(parameters, grads)]
    value = F.cross_entropy(call(model, dict(zip(parameters, adapted)), query), y)
    second = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return [loss.detach(), value.detach(), *(grad.detach() for grad in grads), *second]


def test_random_networks_equal_torch_to_the_second_order(spy):
    for seed in range(200):
        model = Network(seed).double()
        x, query = draw(6, 3, 9, 8), draw(6, 3, 9, 8)
        y = torch.arange(6) % 3
        other = copy.deepcopy(model)
        expected = adapt_and_differentiate(model, x, y, query)
        with fast_layers():
            got = adapt_and_differentiate(other, x, y, query)
        largest = max(1.0, *(value.abs().max().item() for value in expected))
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-12 * largest, seed
        close(list(other.buffers()), list(model.buffers()))
    assert all(spy.calls.count(name) > 200 for name in ("conv2d", "batch_norm", "norm_relu"))


def test_float32_and_the_operators_that_ran():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(32, 3)),
    )
    with torch.no_grad():
        # Away from kinks, where rounding would decide.
        model[1].bias.fill_(10), model[5].bias.fill_(10)
    x, query, y = (draw(6, 3, 8, 8, dtype=torch.float32) for _ in range(2)), None, torch.arange(6) % 3
    x, query = x
    expected = adapt_and_differentiate(model, x, y, query)
    got, counts = operators(fast_layers()(lambda: adapt_and_differentiate(model, x, y, query)))
    close(got, expected, 2e-4)
    assert counts.keys() == {
        *("conv2d", "conv2d_input", "conv2d_weight"),
        *(f"batch_norm_relu{order}" for order in ("", "_backward", "_double_backward")),
    }
    # Forward of two layers, twice; the ReLU is part of each backward pass.
    assert counts["batch_norm_relu"] == 4
    assert operators(lambda: adapt_and_differentiate(model, x, y, query))[1] == {}


def layered(x, weight, gamma, beta, last, bias):
    """Batch norms with and without a ReLU behind, and a convolution whose bias matters."""
    z = F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), None, None, gamma, beta, True))
    return F.batch_norm(F.conv2d(z, last, bias, stride=2, padding=1).pow(2), None, None, None, None, True).pow(3)


def composed(x, weight, gamma, beta, last, bias):
    """The same without batch norms of torch's, whose third derivative is wrong."""

    def norm(y, gamma, beta, relu):
        rows = y.permute(0, 2, 3, 1).flatten(0, 2)[None]
        z = reference.batch_norm_relu(rows, gamma[None], beta[None], 1e-5, relu)
        return z.reshape(y.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)

    z = norm(F.conv2d(x, weight, padding=1), gamma, beta, True)
    y = F.conv2d(z, last, bias, stride=2, padding=1).pow(2)
    return norm(y, torch.ones_like(bias), torch.zeros_like(bias), False).pow(3)


def layer_operands():
    shapes = (3, 2, 4, 4), (3, 2, 3, 3), (3,), (3,), (2, 3, 3, 3), (2,)
    return tuple(draw(*shape, requires_grad=True) for shape in shapes)


def test_third_order_equals_the_composition():
    operands = layer_operands()
    directions = [[draw(*X.shape) for X in operands] for _ in range(3)]

    def orders(function):
        value, results = function(*operands).sum(), []
        for direction in directions:
            grads = torch.autograd.grad(value, operands, create_graph=True, materialize_grads=True)
            results += grads
            value = sum((grad * vector).sum() for grad, vector in zip(grads, direction))
        return results

    expected = orders(composed)
    with fast_layers():
        got = orders(layered)
    close(got, expected, 1e-9)


def test_batched_cotangents_of_both_orders():
    operands = layer_operands()
    first, second = draw(4, 3, 2, 2, 2), [draw(4, *X.shape) for X in operands]

    def orders(function):
        y = function(*operands)
        grads = torch.autograd.grad(y, operands, first, is_grads_batched=True, create_graph=True)
        last = torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), operands, retain_graph=True)
        simple = torch.autograd.grad(y, operands, torch.ones_like(y), create_graph=True)
        return [*grads, *last, *torch.autograd.grad(simple, operands, second, is_grads_batched=True)]

    expected = orders(composed)
    close(orders(fast_layers()(layered)), expected, 1e-9)


def layer(x, gamma):
    return F.batch_norm(x, None, None, gamma, None, True)


def test_the_pre_activation_may_be_used_and_differentiated(spy):
    x, gamma = draw(4, 3, 5, 5, requires_grad=True), draw(3, requires_grad=True)

    def inside():
        z = layer(x, gamma)
        h = F.relu(z)
        loss = (h * h).sum() + (z.sin() * h).sum() + F.relu(z).pow(3).sum()
        return z, h, *torch.autograd.grad(loss, [z, x, gamma], create_graph=True)

    def second(z, h, dz, dx, dgamma):
        return [z, h, dz, dx, dgamma, *torch.autograd.grad(dz.pow(2).sum() + (dx * x).sum() + dgamma.sum(), [x, gamma])]

    expected = second(*inside())
    with fast_layers():
        results = inside()
        got = second(*results)
    close(got, expected)
    # A backward pass outside the block, by a tensor that left it.
    close(second(*fast_layers()(inside)()), expected)
    assert spy.calls.count("norm_relu") >= 2


HOOKS = {
    "before": lambda z, seen: z.register_hook(seen) and F.relu(z),
    "retain_grad": lambda z, seen: (z.retain_grad(), F.relu(z), seen.kept.append(z))[1],
    "node": lambda z, seen: z.grad_fn.register_prehook(lambda grads: seen(grads[0])) and F.relu(z),
    "after": lambda z, seen: (F.relu(z), z.register_hook(seen))[0],
    "in place": lambda z, seen: z.register_hook(seen) and F.relu(z, inplace=True),
    "in place, after": lambda z, seen: (F.relu(z, inplace=True), z.register_hook(seen))[0],
}


class Seen:
    def __init__(self):
        self.kept, self.values = [], []

    def __call__(self, grad):
        self.values.append(grad.clone())


@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_the_pre_activation_see_its_gradient(how):
    x, gamma = draw(4, 3, 5, 5, requires_grad=True), draw(3, requires_grad=True)

    def run():
        seen = Seen()
        h = HOOKS[how](layer(x, gamma), seen)
        grads = torch.autograd.grad(h.pow(2).sum(), [x, gamma]) if how != "retain_grad" else h.pow(2).sum().backward()
        return [*seen.values, *(z.grad for z in seen.kept), *(grads or [])]

    expected = run()
    with fast_layers():
        got = run()
    assert len(expected) == (1 if how == "retain_grad" else 3)
    close(got, expected)


def test_a_hook_that_is_added_outside_and_outlives_its_tensor():
    x, gamma, seen = draw(4, 3, 5, 5, requires_grad=True), draw(3, requires_grad=True), Seen()
    with fast_layers():
        z = layer(x, gamma)
        h = F.relu(z)
    z.register_hook(seen)
    (expected,) = torch.autograd.grad(h.pow(2).sum(), z, retain_graph=True)
    seen.values.clear()
    del z
    h.pow(2).sum().backward()
    close(seen.values, [expected])


@torch.no_grad()
def silently_doubled(z):
    z.add_(z)


def test_in_place_relu_changes_the_tensor_itself(spy):
    x, gamma = draw(4, 3, 5, 5, requires_grad=True), draw(3, requires_grad=True)
    with fast_layers():
        z = layer(x, gamma)
        version = z._version
        assert F.relu(z, inplace=True) is z and z._version == version + 1
        assert z.min() == 0 and not z._is_view()
        z.sum().backward()
        # Through a view: the values are no longer those of batch norm alone.
        for change in (silently_doubled, lambda z: z.data.neg_(), lambda z: z.detach().neg_(), lambda z: z[0].neg_()):
            z = layer(x, gamma)
            change(z)
            spy.calls.clear()
            z = F.relu(z)
            assert not spy.calls
            expected = layer(x, gamma)
            change(expected)
            close(z, expected.clamp_min(0))
        spy.calls.clear()
        z = layer(x, gamma)
        with torch.no_grad():
            assert F.relu(z, inplace=True) is z and spy.calls == ["batch_norm"]


def test_what_autograd_needs_may_not_change():
    def changed(which):
        x, gamma = draw(4, 3, 5, 5, requires_grad=True).clone(), draw(3, requires_grad=True).clone()
        h = F.relu(layer(x, gamma))
        (x if which == "x" else gamma).mul_(2)
        h.sum().backward()

    for which in ("x", "gamma"):
        for block in (fast_layers(), torch.no_grad()):
            with block, torch.enable_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
                changed(which)
    with fast_layers():
        x = draw(4, 3, 5, 5, requires_grad=True).clone()
        z = layer(x, None)
        x.mul_(2)
        h = F.relu(z)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()


def changed_at_once(beta):
    with torch.no_grad():
        beta.add_(1)


@pytest.mark.parametrize("change", [changed_at_once, lambda beta: beta.data.sub_(1), lambda beta: beta.data.neg_()])
def test_a_bias_may_change_before_the_backward_pass(change):
    x, gamma, start = draw(4, 3, 5, 5, requires_grad=True), draw(3, requires_grad=True), draw(3)

    def run():
        beta = start.clone().requires_grad_()
        h = F.relu(F.batch_norm(x, None, None, gamma, beta, training=True))
        change(beta)
        first = torch.autograd.grad(h.pow(3).sum(), [x, gamma, beta], create_graph=True)
        return [*first, *torch.autograd.grad(first[0].pow(2).sum(), [x, gamma, beta])]

    expected = run()
    with fast_layers():
        got = run()
    close(got, expected, 1e-10)


def transposed(z):
    part = z[0]
    z.transpose_(2, 3)
    return part


def replaced(z):
    whole = torch.ones(z.shape, dtype=DOUBLE).contiguous(memory_format=torch.channels_last)
    z.data = whole
    return whole


@pytest.mark.parametrize("alias", [transposed, replaced])
@torch.no_grad()
def test_what_shares_memory_goes_on_to(alias):
    x, weight = draw(2, 3, 5, 5), draw(4, 3, 2, 2)

    def run():
        z = F.conv2d(x, weight)
        part = alias(z)
        z.mul_(2)
        return part.clone()

    expected = run()
    with fast_layers():
        got = run()
    close(got, expected)


@torch.no_grad()
def test_a_result_written_to_out_lies_as_torchs():
    x, weight, result = draw(2, 3, 5, 5), draw(4, 3, 2, 2), torch.empty(0, dtype=DOUBLE)
    with fast_layers():
        z = F.conv2d(x, weight)
        assert torch.add(z, z, out=result) is result and result.is_contiguous()
    close(result, 2 * F.conv2d(x, weight))


def test_memory_is_laid_out_as_torchs_before_it_can_be_told():
    x = draw(4, 3, 6, 6, requires_grad=True)
    conv = nn.Conv2d(3, 5, 3).double()
    norm = nn.BatchNorm2d(5).double()
    for function in (conv, lambda x: norm(conv(x)), lambda x: F.relu(norm(conv(x))), lambda x: norm(conv(x)).relu_()):
        expected = function(x)
        with fast_layers():
            y = function(x)
            assert y.view(4, -1).shape == (4, 80) and y.stride() == expected.stride()
            with torch.no_grad():
                y.view(-1)[3] = 7.0
            assert y[0, 0, 0, 3] == 7
            left = function(x)
            pooled = F.max_pool2d(function(x), 2)
        assert left.stride() == expected.stride() and left.view(-1) is not None and pooled.view(-1) is not None
        (dx,) = torch.autograd.grad(left.sum(), x)
        assert dx.is_contiguous()
    # What the user has put in another format, torch leaves there.
    with fast_layers():
        images = x.detach().contiguous(memory_format=torch.channels_last)
        assert (
            F.relu(norm(conv(images))).stride() == F.relu(norm(conv.to(memory_format=torch.channels_last)(x))).stride()
        )
        assert conv(images).is_contiguous(memory_format=torch.channels_last)


X = torch.randn(4, 4, 6, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
W = torch.randn(3, 4, 3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
ONE = torch.ones(4, dtype=DOUBLE)


def convolved(x=X):
    return F.relu(F.batch_norm(F.conv2d(x, W), None, None, training=True)).sum()


def test_off_by_default_thread_local_nested_and_left_by_errors(spy):
    leaf = X.clone().requires_grad_()

    def calls(function):
        spy.calls.clear()
        function()
        return len(spy.calls)

    assert calls(lambda: convolved(leaf)) == 0
    with fast_layers():
        assert calls(lambda: convolved(leaf)) == 3
        with fast_layers():
            z = layer(leaf, ONE)
            assert calls(lambda: convolved(leaf)) == 3
        # Of an inner block, used and seen in the outer.
        close(F.relu(z).view(-1), F.relu(layer(leaf, ONE)).reshape(-1))
        thread = threading.Thread(target=lambda: found.append(calls(lambda: convolved(leaf))))
        found = []
        thread.start()
        thread.join()
        assert found == [0]
        with pytest.raises(ZeroDivisionError), fast_layers():
            raise ZeroDivisionError
        assert calls(lambda: convolved(leaf)) == 3
    with pytest.raises(RuntimeError), fast_layers():
        F.conv2d(X, W[:, :2])
    assert calls(lambda: convolved(leaf)) == 0
    decorated = fast_layers()(convolved)
    assert [calls(lambda: decorated(leaf)) for _ in range(2)] == [3, 3]
    assert kfo_ext.fast_layers is fast_layers and layers.fast_layers is fast_layers


def test_blocks_of_two_threads_and_a_mode_of_the_users():
    seen, results = [], {}

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def work(number):
        leaf = (X + number).requires_grad_()
        with fast_layers():
            for _ in range(20):
                (results[number],) = torch.autograd.grad(convolved(leaf), leaf)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in results.items():
        leaf = (X + number).requires_grad_()
        close(result, torch.autograd.grad(convolved(leaf), leaf)[0])
    with fast_layers(), Counting():
        close(convolved(), convolved(X.clone()))
    assert F.conv2d in seen


def test_nothing_is_kept_after_the_block():
    with fast_layers():
        leaf = X.clone().requires_grad_()
        activations = [F.conv2d(leaf, W, padding=1)]
        activations.append(layer(activations[0], ONE[:3].requires_grad_(False)))
        activations.append(F.relu(activations[1]))
        held = [weakref.ref(activation) for activation in activations]
        # Neither within the block.
        result = activations[-1].sum()
        del activations
        result.backward()
        del result
        assert not any(ref() is not None for ref in held)
        y = F.conv2d(leaf, W)
        held = [weakref.ref(y)]
    del y
    assert not any(ref() is not None for ref in held)


class Flat(nn.Module):
    """A network as learn2learn's own: its features are flattened by `view`."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True)),
        )
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.features(x).view(len(x), -1))


@pytest.mark.parametrize("kind", ["MAML", "GBML", "GBML with our KFO"])
def test_learn2learn_is_unmodified(kind, spy):
    l2l = light_import()
    torch.manual_seed(0)
    kronecker = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=True)
    transform = gradient_transform() if "our" in kind else kronecker
    if kind == "MAML":
        meta = l2l.algorithms.MAML(Flat(), lr=0.2).double()
    else:
        meta = l2l.algorithms.GBML(Flat(), transform=transform, lr=0.2, adapt_transform=True).double()
    x, y = draw(6, 1, 8, 8), torch.arange(6) % 3

    def run(meta):
        learner = meta.clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(x), y))
        F.cross_entropy(learner(x.flip(3)), y).backward()
        return [X.grad for X in meta.parameters()], list(meta.buffers())

    expected = run(copy.deepcopy(meta))
    assert not spy.calls
    with fast_layers():
        got = run(meta)
    assert spy.calls.count("norm_relu") == 6
    close(got, expected)
