"""kfo_ext.fast_layers: what our layers have no rule for runs in torch as it is, errors included."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from layer_spy import Spy
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kfo_ext import fast_layers
from kfo_ext.ops import library, one_task

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")

DOUBLE = torch.float64


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def module_of(*args, **kwargs):
    torch.manual_seed(0)
    return nn.Conv2d(*args, **kwargs, dtype=DOUBLE)


X = torch.randn(4, 4, 6, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
W = torch.randn(3, 4, 3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
ONE = torch.ones(4, dtype=DOUBLE)


def inferred(x):
    with torch.inference_mode():
        return x.clone()


class Tagged(torch.Tensor):
    pass


def meta(x):
    return x.to("meta")


# Each runs in torch, and gives or raises what torch does.
UNSUPPORTED = {
    "groups": lambda: module_of(4, 6, 3, groups=2)(X),
    "dilation": lambda: module_of(4, 6, 2, dilation=2)(X),
    "two strides": lambda: F.conv2d(X, W, stride=(1, 2)),
    "same": lambda: F.conv2d(X, W, padding="same"),
    "circular": lambda: module_of(4, 6, 2, padding=(1, 2), padding_mode="circular", groups=2)(X),
    "one image": lambda: F.conv2d(X[0], W),
    "no images": lambda: F.conv2d(X[:0], W),
    "half": lambda: F.conv2d(X.bfloat16(), W.bfloat16()),
    "two types": lambda: F.conv2d(X.float(), W),
    "complex": lambda: F.conv2d(X.to(torch.complex128), W.to(torch.complex128)),
    "integers": lambda: F.conv2d(X.long(), W.long()),
    "negated": lambda: F.conv2d(torch.complex(X, X).conj().imag, W),
    "meta": lambda: F.conv2d(meta(X), meta(W)).shape,
    "sparse": lambda: F.conv2d(X.to_sparse(), W),
    "subclass": lambda: F.conv2d(X.as_subclass(Tagged), W),
    "wrong channels": lambda: F.conv2d(X[:, :3], W),
    "too small": lambda: F.conv2d(X[:, :, :2], W),
    "no kernel": lambda: F.conv2d(X, W[:, :, :0]),
    "wrong bias": lambda: F.conv2d(X, W, ONE),
    "no weight": lambda: F.conv2d(X, None),
    "nothing": lambda: F.conv2d(),
    "unknown argument": lambda: F.conv2d(X, W, strides=2),
    "inference tensor": lambda: F.conv2d(inferred(X), W),
    "overflowing stride": lambda: F.conv2d(X, W, stride=1 << 64),
    "stride 0": lambda: F.conv2d(X, W, stride=0),
    "stride of a list of lists": lambda: F.conv2d(X, W, stride=[[1], [1]]),
    "negative padding": lambda: F.conv2d(X, W, padding=-1),
    "huge padding": lambda: F.conv2d(X, W, padding=1 << 40),
    "conv1d": lambda: F.conv1d(X[0], W[..., 0]),
    "conv3d": lambda: F.conv3d(X[None], W[None].expand(4, -1, -1, -1, -1)),
    "transposed": lambda: F.conv_transpose2d(X, W.movedim(0, 1)),
    "evaluation": lambda: F.batch_norm(X, 0 * ONE, ONE),
    "one value": lambda: F.batch_norm(X[:1, :, :1, :1], None, None, training=True),
    "vectors": lambda: F.batch_norm(X[:, :, 0, 0], None, None, training=True),
    "videos": lambda: F.batch_norm(X[..., None], None, None, training=True),
    "one statistic": lambda: F.batch_norm(X, ONE.clone(), None, training=True),
    "statistics of another size": lambda: F.batch_norm(X, ONE[:3].clone(), ONE[:3].clone(), training=True),
    "no momentum": lambda: F.batch_norm(X, ONE.clone(), ONE.clone(), training=True, momentum=None),
    "half images": lambda: F.batch_norm(X.half(), None, None, training=True),
    "mixed types": lambda: F.batch_norm(X.bfloat16(), ONE.float(), ONE.float(), training=True),
    "negative eps": lambda: F.batch_norm(X, None, None, training=True, eps=-1.0),
    "no batch": lambda: F.batch_norm(X[:0], None, None, training=True),
    "relu of nothing": lambda: F.relu(),
    "relu of a number": lambda: F.relu(3),
    "relu of integers": lambda: F.relu(X.long()),
    "relu of a leaf": lambda: F.relu(X.clone().requires_grad_(), inplace=True),
    "instance norm": lambda: F.instance_norm(X),
}


def outcome(run):
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_supported_runs_in_torch(name, spy):
    expected = outcome(UNSUPPORTED[name])
    with fast_layers():
        got = outcome(UNSUPPORTED[name])
    assert not spy.calls
    if isinstance(expected, torch.Tensor):
        assert type(got) is type(expected) and got.dtype == expected.dtype
        assert torch.equal(got, expected) or name == "negative eps"
    else:
        assert got == expected


def convolved(x=X):
    return F.relu(F.batch_norm(F.conv2d(x, W), None, None, training=True)).sum()


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "kfo_ext"
        return func(*args, **(kwargs or {}))


def in_forward_mode():
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(convolved(forward_ad.make_dual(X, X.cos()))).tangent


def within(manager, function=convolved):
    def run():
        with manager():
            return function()

    return run


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(convolved, X, check_trace=False)(X)


CONTEXTS = {
    "grad": lambda: torch.func.grad(convolved)(X),
    "grad of grad": lambda: torch.func.grad(lambda x: torch.func.grad(convolved)(x).pow(2).sum())(X),
    "vmap": lambda: torch.func.vmap(convolved)(X.expand(2, -1, -1, -1, -1)),
    "jvp": lambda: torch.func.jvp(convolved, (X,), (X.cos(),))[1],
    "forward mode": in_forward_mode,
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16), lambda: F.conv2d(X.float(), W.float()).sum()),
    "inference mode": within(torch.inference_mode),
    "dispatch mode": within(Watching),
    "saved tensors": within(lambda: torch.autograd.graph.save_on_cpu()),
    "jit": traced,
    "checkpoint": lambda: torch.autograd.grad(
        checkpoint(convolved, leaf := X.clone().requires_grad_(), use_reentrant=False), leaf
    )[0],
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore")
def test_under_other_modes_of_torch_torch_runs(name, spy):
    expected = CONTEXTS[name]()
    with fast_layers():
        got = CONTEXTS[name]()
    assert not spy.calls
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore")
def test_an_activation_of_ours_within_a_transform():
    with fast_layers():
        y = F.conv2d(X, W)
        got = torch.func.vmap(lambda scale: (scale * y.view(4, -1)).sum())(ONE)
    close(got, F.conv2d(X, W).sum() * ONE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True], ids=["block around", "block within"])
def test_a_compiled_function_is_torchs_own(inside):
    torch._dynamo.reset()

    def function(x):
        if inside:
            with fast_layers():
                return convolved(x)
        return convolved(x)

    compiled = torch.compile(function, backend="aot_eager")
    leaf = X.clone().requires_grad_()
    with fast_layers():
        got = torch.autograd.grad(compiled(leaf), leaf)
    close(got, torch.autograd.grad(convolved(leaf), leaf))
    torch._dynamo.reset()


def test_a_stride_beyond_the_image():
    leaf = X.clone().requires_grad_()
    for stride in (6, 50, (1 << 63) - 1):
        expected = torch.autograd.grad(F.conv2d(leaf, W, stride=stride).sum(), leaf)
        with fast_layers():
            close(torch.autograd.grad(F.conv2d(leaf, W, stride=stride).sum(), leaf), expected)


def test_without_memory_torch_has_its_turn(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no memory left")

    expected = convolved()
    for name in ("conv2d", "batch_norm"):
        monkeypatch.setattr(one_task, name, full)
    with fast_layers():
        assert torch.equal(convolved(), expected)
