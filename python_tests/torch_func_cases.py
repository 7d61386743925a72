"""For the tests of torch.func: its transforms as explicit loops in plain torch, and the operators with operands."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kfo_ext import Problems
from kfo_ext.functional import adjoint, batch_norm_relu, conv2d, transform

EXAMPLES, TASKS = 3, 2


class Seen(TorchDispatchMode):
    """Counts the operators that run below all transforms, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def ours(self):
        return {name for name in self.calls if name.startswith("kfo_ext::")}


# The functions in the graphs that torch.compile has traced.
GRAPHS: list[str] = []


def traced(module, inputs):
    GRAPHS.extend(str(node.target) for node in module.graph.nodes)
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


class Loops:
    """torch.func's transforms in plain torch: torch.autograd.grad, and a loop over the examples."""

    @staticmethod
    def grad(function, argnums=None):
        def gradients(*X):
            leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in X]
            with torch.enable_grad():
                value = function(*leaves)
            return torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)

        return gradients

    @staticmethod
    def vmap(function, dims):
        def mapped(*X):
            size = next(x.shape[dim] for x, dim in zip(X, dims) if dim is not None)
            results = [
                function(*(x if dim is None else x.select(dim, i) for x, dim in zip(X, dims))) for i in range(size)
            ]
            return (
                torch.stack(results) if isinstance(results[0], torch.Tensor) else tuple(map(torch.stack, zip(*results)))
            )

        return mapped

    @staticmethod
    def jacrev(function):
        def rows(*X):
            leaf = X[0].detach().requires_grad_()
            y = function(leaf, *X[1:])
            gradients = [torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in y.reshape(-1)]
            return torch.stack(gradients).reshape(y.shape + leaf.shape)

        return rows

    @staticmethod
    def jvp(function, X, tangents):
        return torch.autograd.functional.jvp(function, tuple(X), tuple(tangents))[1]

    linearize = jvp

    @staticmethod
    def vjp(function, X, cotangent):
        leaves = [x.detach().requires_grad_() for x in X]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    @staticmethod
    def hessian(function):
        def second(x):
            leaf = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
            rows = [torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in g.reshape(-1)]
            return torch.stack(rows).reshape(x.shape + x.shape)

        return second

    compile = staticmethod(lambda function: function)
    functionalize = staticmethod(lambda function: function)


class Functorch:
    """The same of torch.func."""

    vmap = staticmethod(lambda function, dims: torch.vmap(function, in_dims=dims))
    jacrev = staticmethod(torch.func.jacrev)
    hessian = staticmethod(torch.func.hessian)
    functionalize = staticmethod(torch.func.functionalize)

    @staticmethod
    def grad(function):
        return lambda *X: torch.func.grad(function, argnums=tuple(range(len(X))))(*X)

    @staticmethod
    def jvp(function, X, tangents):
        return torch.func.jvp(function, tuple(X), tuple(tangents))[1]

    @staticmethod
    def linearize(function, X, tangents):
        return torch.func.linearize(function, *X)[1](*tangents)

    @staticmethod
    def vjp(function, X, cotangent):
        return torch.func.vjp(function, *X)[1](cotangent)

    @staticmethod
    def compile(function):
        torch._dynamo.reset()
        return torch.compile(function, backend=traced, fullgraph=True)


SHAPES = [(2, 2, 3), (1, 3, 2)]
PROBLEMS = Problems(SHAPES)


def plain_products(equation, R, G, L, bias=None):
    out, r, g, k, b = [], 0, 0, 0, 0
    for B, p, q in SHAPES:
        left, right = R[:, r : r + p * p].unflatten(1, (p, p)), L[:, k : k + q * q].unflatten(1, (q, q))
        left, right = left.expand(len(G), p, p), right.expand(len(G), q, q)
        Y = torch.einsum(equation, left, G[:, g : g + B * p * q].unflatten(1, (B, p, q)), right)
        if bias is not None:
            Y = Y + bias[:, b : b + p * q].unflatten(1, (1, p, q))
        out.append(Y.flatten(1))
        r, g, k, b = r + p * p, g + B * p * q, k + q * q, b + p * q
    return torch.cat(out, 1)


def plain_conv2d(x, weight):
    images = [F.conv2d(a.permute(0, 3, 1, 2), w, stride=2, padding=1) for a, w in zip(x, weight)]
    return torch.stack(images).permute(0, 1, 3, 4, 2)


def plain_batch_norm(x, weight, bias, relu):
    tasks = []
    for t in range(len(x)):
        row = t if len(weight) > 1 else 0
        d = x[t] - x[t].mean(0)
        z = d / (d.square().mean(0) + 1e-2).sqrt() * weight[row] + bias[t if len(bias) > 1 else 0]
        tasks.append(z.clamp(min=0) if relu else z)
    return torch.stack(tasks)


class Column(NamedTuple):
    """An operator, what it is in plain torch, operands of all examples, and the dimension that each is mapped at."""

    ours: object
    plain: object
    sizes: tuple
    dims: tuple
    kernels: str
    reference_op: str


GR, GL, GG, Gb = (
    (1, PROBLEMS.R.numel),
    (1, PROBLEMS.L.numel),
    (TASKS, PROBLEMS.packing.numel),
    (1, PROBLEMS.bias.numel),
)
by_task = "tki,tbkl,tlj->tbij"
COLUMNS = {
    "transform": Column(
        lambda G, R, L: transform(R, G, L, PROBLEMS),
        lambda G, R, L: plain_products(by_task, R, G, L),
        (GG, GR, GL), (0, None, None), "transform", "aten::bmm",
    ),
    "transform, mapped factors": Column(
        lambda G, R, L, bias: transform(R, G, L, PROBLEMS, bias=bias),
        lambda G, R, L, bias: plain_products(by_task, R, G, L, bias),
        (GG, (TASKS, GR[1]), GL, Gb), (None, -1, 1, 0), "transform", "aten::bmm",
    ),
    "adjoint": Column(
        lambda G, R, L: adjoint(R, G, L, PROBLEMS),
        lambda G, R, L: plain_products("tik,tbkl,tjl->tbij", R, G, L),
        (GG, GR, (TASKS, GL[1])), (1, 0, None), "transform_backward", "aten::bmm",
    ),
    "conv2d": Column(
        lambda x, w: conv2d(x, w, stride=2, padding=1), plain_conv2d,
        ((TASKS, 2, 4, 3, 2), (TASKS, 3, 2, 3, 2)), (2, None), "conv2d", "aten::convolution",
    ),
    "conv2d, mapped weight": Column(
        lambda w, x: conv2d(x, w, stride=2, padding=1), lambda w, x: plain_conv2d(x, w),
        ((TASKS, 3, 2, 3, 2), (TASKS, 2, 4, 3, 2)), (-1, None), "conv2d", "aten::convolution",
    ),
    "conv2d, mapped both": Column(
        lambda x, w: conv2d(x, w, stride=2, padding=1), plain_conv2d,
        ((1, 2, 4, 3, 2), (1, 3, 2, 3, 2)), (0, 1), "conv2d", "aten::convolution",
    ),
    "conv2d, grouped": Column(
        lambda x, w: conv2d(x, w, stride=2, padding=1, backend="grouped"), plain_conv2d,
        ((TASKS, 2, 4, 3, 2), (TASKS, 3, 2, 3, 2)), (2, None), "grouped_conv2d", "aten::convolution",
    ),
    "batch_norm": Column(
        lambda x, w, b: batch_norm_relu(x, w, b, eps=1e-2), partial(plain_batch_norm, relu=True),
        ((TASKS, 5, 3), (1, 3), (1, 3)), (0, None, None), "batch_norm_relu", "aten::rsqrt",
    ),
    "batch_norm, mapped weight": Column(
        lambda x, w, b: batch_norm_relu(x, w, b, eps=1e-2, relu=False), partial(plain_batch_norm, relu=False),
        ((TASKS, 5, 3), (1, 3), (TASKS, 3)), (2, 1, None), "batch_norm_relu", "aten::rsqrt",
    ),
}  # fmt: skip


def operands(column, seed=0):
    """Of one example, and of all."""
    torch.manual_seed(seed)
    X = []
    for size, dim in zip(column.sizes, column.dims):
        x = (
            torch.randn(EXAMPLES, *size, dtype=torch.float64)
            if dim is not None
            else torch.randn(size, dtype=torch.float64)
        )
        X.append(x if dim is None else x.movedim(0, dim))
    return [x if dim is None else x.select(dim, 0) for x, dim in zip(X, column.dims)], X
