"""Whole modules of torch in one forward of all tasks: outputs, two derivatives and buffers equal a loop in float64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from test_verified import TASKS, assert_equal, orders
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from verified_cases import TRUTH

from kfo_ext.adapt.vmapped import Plan, Unserved, make_plan, mapped

ROWS, TOKENS, SEQUENCE, IMAGE, VOLUME = (5, 4), (2, 5, 4), (4, 3, 7), (4, 3, 6, 7), (3, 3, 4, 5, 4)


class Of(nn.Module):
    """Modules by name, and a function of x and this module."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Block(nn.Module):
    """A residual block of two convolutions, with max pooling and activations in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs, track_running_stats=False)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        y += self.shortcut(x)
        return self.pool(self.relu(y))


def shared_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied_layers() -> nn.Module:
    model = Of(
        lambda m, x: F.linear(m.norm(m.first(x)).relu(), m.second.weight.mT) + x * m.second(x).sum(),
        first=nn.Linear(4, 3),
        second=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
    )
    model.second.weight = model.first.weight
    return model


def norms_that_share_a_statistic() -> nn.Module:
    # In float64 already: a conversion would give each its own.
    first, second = nn.BatchNorm2d(3, momentum=0.1).double(), nn.BatchNorm2d(3, momentum=0.4).double()
    second.running_mean = first.running_mean
    return nn.Sequential(first, second, nn.Tanh(), first)


MODULES: dict[str, tuple] = {
    "attention": (lambda: Of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)), TOKENS),
    "attention with bias to keys": (
        lambda: Of(
            lambda m, x: m.a(x, x, x.tanh(), need_weights=False)[0],
            a=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True),
        ),
        TOKENS,
    ),
    "attention of other sizes": (
        lambda: Of(
            lambda m, x: m.a(x, x[..., :3], x[..., 1:3])[0],
            a=nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True),
        ),
        TOKENS,
    ),
    "attention in evaluation": (
        lambda: Of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, 0.3, batch_first=True)).eval(),
        TOKENS,
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), TOKENS),
    "encoder, norm first": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, norm_first=True), TOKENS),
    "decoder": (lambda: Of(lambda m, x: m.d(x, x * 2), d=nn.TransformerDecoderLayer(4, 2, 8, 0.0)), TOKENS),
    "bilinear": (lambda: Of(lambda m, x: m.b(x, x.tanh()), b=nn.Bilinear(4, 4, 3)), TOKENS),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), ROWS),
    "RMS norm": (lambda: nn.RMSNorm(4), TOKENS),
    "local response norm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "group norm after a convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), IMAGE),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), ROWS),
    "weight norm of a convolution": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 2, 3), dim=1), IMAGE),
    "spectral norm in evaluation": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), ROWS),
    "orthogonal by a map that is not served": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), ROWS),
    "shared layer": (shared_layer, ROWS),
    "tied layers": (tied_layers, ROWS),
    "norms that share a statistic": (norms_that_share_a_statistic, IMAGE),
    "list and dict": (
        lambda: Of(
            lambda m, x: sum(m.d["a"](each(x)) for each in m.l),
            d=nn.ModuleDict({"a": nn.Linear(3, 2)}),
            l=nn.ModuleList(nn.Linear(4, 3) for _ in range(2)),
        ),
        ROWS,
    ),
    "embedding": (
        lambda: Of(
            lambda m, x: m.l(m.e((x > 0).long()).mean(1)), e=nn.Embedding(2, 3, padding_idx=0), l=nn.Linear(3, 2)
        ),
        ROWS,
    ),
    "residual block": (
        lambda: nn.Sequential(Block(3, 4), Block(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)),
        IMAGE,
    ),
    "view after a convolution": (
        lambda: Of(lambda m, x: m.l(m.c(x).view(x.size(0), -1)), c=nn.Conv2d(3, 2, 3), l=nn.Linear(40, 3)),
        IMAGE,
    ),
    "norm used twice": (
        lambda: Of(lambda m, x: (lambda y: y.relu() + y)(m.n(m.c(x))), c=nn.Conv2d(3, 2, 3), n=nn.BatchNorm2d(2)),
        IMAGE,
    ),
    "bias before a norm and something else": (
        lambda: Of(lambda m, x: (lambda y: m.n(y) + y)(m.c(x)), c=nn.Conv2d(3, 2, 3), n=nn.BatchNorm2d(2)),
        IMAGE,
    ),
    "bias before a norm": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU()), IMAGE),
    "norm as the result": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)), IMAGE),
    "relu as a method": (
        lambda: Of(lambda m, x: m.n(m.c(x)).relu_() * 2, c=nn.Conv2d(3, 2, 3), n=nn.BatchNorm2d(2)),
        IMAGE,
    ),
    "in place between a convolution and a norm": (
        lambda: Of(changed_between, c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), d=nn.Conv2d(4, 2, 2)),
        IMAGE,
    ),
    "spatial means": (
        lambda: Of(
            lambda m, x: (lambda y: y.mean((-1, 2)) * y.mean(dim=[3, 2], keepdim=True).flatten(1) + y.mean())(m.c(x)),
            c=nn.Conv2d(3, 2, 3),
        ),
        IMAGE,
    ),
    "means by other names": (
        lambda: Of(
            lambda m, x: (
                (lambda y: y.mean(axis=(2, 3)) + torch.mean(input=y, dim=(2, 3)) + y.mean().mean((0,)))(m.c(x))
                + F.linear(input=x[:, :, 0, 0], weight=m.c.weight[:, :, 0, 0], bias=m.c.bias)
            ),
            c=nn.Conv2d(3, 2, 3),
        ),
        IMAGE,
    ),
    "mean with a dtype": (
        lambda: Of(lambda m, x: m.c(x).mean((2, 3), dtype=torch.float64), c=nn.Conv2d(3, 2, 3)),
        IMAGE,
    ),
    "upsampling": (lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 2, 3)), IMAGE),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.ChannelShuffle(2)), IMAGE),
    "unfold": (lambda: nn.Sequential(nn.Unfold(2), nn.Fold((6, 7), 2)), IMAGE),
    "no gradient inside": (lambda: Of(lambda m, x: m.l(x) * no_gradient(m.l, x), l=nn.Linear(4, 4)), ROWS),
    "dropout in evaluation": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.AlphaDropout()).eval(), ROWS),
}


def changed_between(m: nn.Module, x: Tensor) -> Tensor:
    y = m.c(x)
    z = y.tanh()
    y[:, 1] *= 2
    y.add_(z)
    y = m.n(y)
    y.mul_(z)
    return m.d(y)


def no_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x).sigmoid()


for size, shape in enumerate((SEQUENCE, IMAGE, VOLUME), 1):
    for padding in ("zeros", "reflect", "replicate", "circular"):
        kind = getattr(nn, f"Conv{size}d")
        MODULES[f"{kind.__name__} {padding}"] = (partial(kind, 3, 2, 3, padding=1, padding_mode=padding), shape)
    for name, options in (
        ("Conv", (3, 6, 2, 1, 1, 1, 3)),
        ("ConvTranspose", (3, 2, 3, 2, 1, 1)),
        ("MaxPool", (2,)),
        ("AvgPool", (3, 2, 1)),
        ("LPPool", (2, 2)),
        ("AdaptiveAvgPool", (1,)),
        ("AdaptiveMaxPool", (2,)),
        ("InstanceNorm", (3, 1e-5, 0.1, True)),
        ("BatchNorm", (3,)),
        ("BatchNorm", (3, 1e-3, 0.3, False, False)),
        ("BatchNorm", (3, 1e-5, 0.1, False, True)),
        ("ZeroPad", (1,)),
        ("ReflectionPad", (1,)),
        ("ReplicationPad", (1,)),
        ("CircularPad", (1,)),
        ("ConstantPad", (1, 0.5)),
        ("Dropout", (0.0,)),
    ):
        kind = getattr(nn, f"{name}{size}d")
        MODULES[f"{kind.__name__}{options}"] = (partial(kind, *options), shape)
for name in [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
    "Identity",
    "Softmax2d",
    "Flatten",
]:
    arguments = (0.1, 0.2) if name == "Threshold" else (1,) if name in ("LogSoftmax", "Softmax", "Softmin") else ()
    shape = (*SEQUENCE[:2], 8) if name == "GLU" else IMAGE if name == "Softmax2d" else TOKENS
    MODULES[name] = (partial(getattr(nn, name), *arguments), shape)
MODULES["RReLU in evaluation"] = (lambda: nn.RReLU().eval(), TOKENS)
UNSERVED = {"orthogonal by a map that is not served": "has no verified rule"}


class Truth(TorchFunctionMode):
    """Calls the truth where a function of torch itself has none or a wrong second derivative."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return TRUTH.get(func, func)(*args, **(kwargs or {}))


def call(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> object:
    return functional_call(module, parameters, (x,))


@pytest.mark.parametrize("name", MODULES)
def test_module_equals_the_loop(name):
    make, shape = MODULES[name]
    module = make().double()
    other = copy.deepcopy(module)
    parameters = {
        key: torch.randn(TASKS, *value.shape, dtype=value.dtype).requires_grad_()
        for key, value in module.named_parameters()
    }
    x = torch.randn(TASKS, *shape, dtype=torch.float64).requires_grad_()
    leaves = [*parameters.values(), x]

    def one(parameters, x):
        return call(module, parameters, x)

    plan = make_plan(module, one, {key: value[:1] for key, value in parameters.items()}, x[:1])
    assert UNSERVED.get(name, "") in plan.reason
    if name in UNSERVED:
        return
    assert plan.reason == ""
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, other.get_buffer(key)), f"the plan's forward changed {key}"
    received = orders(tree_leaves(mapped(module, one, plan)(parameters, x)), leaves)
    with sdpa_kernel(SDPBackend.MATH), Truth():
        tasks = [tree_leaves(call(other, {key: p[i] for key, p in parameters.items()}, x[i])) for i in range(TASKS)]
    expected = orders([torch.stack(each) for each in zip(*tasks)], leaves)
    assert_equal(received, expected, "result")
    for key, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(key), msg=lambda m, key=key: f"{key}: {m}")


def changes_what_it_has_flattened(m: nn.Module, x: Tensor) -> Tensor:
    y = m.c(x)
    z = y.flatten(1)
    z += 1
    return y


def changes_what_it_has_flattened_as_a_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.c(x)
    z = y.view(len(y), -1)
    y[:, 0].mul_(2)
    return z


NOT_SERVED = {
    "flatten, then in place": (changes_what_it_has_flattened, "reshaped"),
    "view, then in place": (changes_what_it_has_flattened_as_a_view, "reshaped"),
    "input in place": (lambda m, x: m.c(x.sub_(1)), "argument"),
    "input in place by a layer": (lambda m, x: m.c(F.relu(x, inplace=True)), "argument"),
    "parameter in place": (lambda m, x: m.c(x) * m.c.weight.detach().clamp_(0, 1).sum(), "argument"),
    "transform inside": (lambda m, x: torch.vmap(torch.sin)(m.c(x)), "transform of torch.func"),
    "gradient inside": (lambda m, x: torch.func.grad(lambda z: m.c(z).sum())(x), "transform of torch.func"),
    "reentrant checkpoint": (lambda m, x: checkpoint(m.c, x, use_reentrant=True), "setup_context"),
    "scripted": (lambda m, x: m.s(m.c(x)), "torch.jit"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_a_loop_computes_otherwise_is_not_served(name):
    function, reason = NOT_SERVED[name]
    modules = {"s": torch.jit.script(nn.ReLU())} if name == "scripted" else {}
    module = Of(function, c=nn.Conv2d(3, 3, 3), **modules).double()
    parameters = {key: value.detach()[None] for key, value in module.named_parameters()}
    x = torch.randn(1, *IMAGE, dtype=torch.float64)
    before = [x.clone(), *(value.clone() for value in parameters.values())]
    plan = make_plan(module, lambda parameters, x: call(module, parameters, x), parameters, x)
    assert reason in plan.reason
    if reason == "argument":
        assert all(torch.equal(a, b) for a, b in zip(before, [x, *parameters.values()]))


def test_a_checkpoint_inside_raises_in_the_forward():
    module = Of(lambda m, x: checkpoint(m.c, x, use_reentrant=False), c=nn.Linear(4, 3)).double()
    parameters = {
        key: value.detach().expand(TASKS, *value.shape).requires_grad_() for key, value in module.named_parameters()
    }
    x = torch.randn(TASKS, *ROWS, dtype=torch.float64)
    with pytest.raises(Unserved, match="checkpoint"):
        mapped(module, lambda parameters, x: call(module, parameters, x), Plan(""))(parameters, x)
