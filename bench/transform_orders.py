"""The three orders of the transform, each computed by several providers on the same operands.

    forward            Y from (R, G, L)
    backward           (dR, dG, dL) from (R, G, L, dY)
    double_backward    (dR, dG, dL, ddY) from (R, G, L, dY, ddR, ddG, ddL)

Every operand is a list, one tensor (tasks, ...) per parameter; every task has factors of its own. Where a provider goes
through autograd, the graph below the measured order is built beforehand and kept, so that the order alone is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.transform import Problems, transform

ORDERS = ("forward", "backward", "double_backward")
Outputs = list[Tensor]
Orders = dict[str, Callable[[], Outputs]]


class Case(NamedTuple):
    """Operands of all orders: lists over the parameters.

    G, dY, ddG: (tasks, *parameter)
    R, ddR: (tasks, p, p)
    L, ddL: (tasks, q, q)
    """

    problems: Problems
    R: list[Tensor]
    G: list[Tensor]
    L: list[Tensor]
    dY: list[Tensor]
    ddR: list[Tensor]
    ddG: list[Tensor]
    ddL: list[Tensor]


def random_case(parameters: Sequence[Tensor], tasks: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """Random operands for the parameters of one network."""
    problems = Problems.of(parameters)
    generator = torch.Generator().manual_seed(seed)

    def random(packing):
        shapes = [(tasks, *shape) for shape in packing.shapes]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    like = (problems.R, problems.packing, problems.L, problems.packing, problems.R, problems.packing, problems.L)
    return Case(problems, *(random(packing) for packing in like))


def through_autograd(forward: Callable[..., Outputs], case: Case) -> Orders:
    """All orders of a differentiable forward(R, G, L) on lists."""
    R, G, L, dY = ([X.detach().requires_grad_() for X in operand] for operand in (case.R, case.G, case.L, case.dY))
    inputs, cotangents = [*R, *G, *L], [*case.ddR, *case.ddG, *case.ddL]
    Y = forward(R, G, L)
    first = torch.autograd.grad(Y, inputs, dY, create_graph=True)

    def no_graph() -> Outputs:
        with torch.no_grad():
            return forward(R, G, L)

    return {
        "forward": no_graph,
        "backward": lambda: list(torch.autograd.grad(Y, inputs, case.dY, retain_graph=True)),
        "double_backward": lambda: list(torch.autograd.grad(first, [*inputs, *dY], cotangents, retain_graph=True)),
    }


def kfo_packed(case: Case) -> Orders:
    """Our three ops, packed operands in, packed outputs out."""
    problems, ops = case.problems, torch.ops.kfo_ext
    R, ddR = problems.R.pack(case.R), problems.R.pack(case.ddR)
    G, dY, ddG = (problems.packing.pack(X) for X in (case.G, case.dY, case.ddG))
    L, ddL = problems.L.pack(case.L), problems.L.pack(case.ddL)
    shapes, every = problems.flat, [True] * 4
    return {
        "forward": lambda: [ops.transform(R, G, L, shapes)],
        "backward": lambda: list(ops.transform_backward(R, G, L, dY, shapes, every[:3])),
        "double_backward": lambda: list(ops.transform_double_backward(R, G, L, dY, ddR, ddG, ddL, shapes, every)),
    }


def kfo_lists(case: Case) -> Orders:
    """Our ops, lists in and lists out: packing and unpacking included, derivatives through autograd."""
    problems = case.problems

    def forward(R, G, L):
        return problems.packing.unpack(
            transform(problems.R.pack(R), problems.packing.pack(G), problems.L.pack(L), problems)
        )

    return through_autograd(forward, case)


def torch_matmul(case: Case) -> Orders:
    """Plain torch, layer after layer, batched over tasks: two broadcast matmuls."""

    def layer(R, G, L, B, p, q):
        return (R.mT.unsqueeze(1) @ (G.reshape(-1, B, p, q) @ L.unsqueeze(1))).view_as(G)

    return _layer_by_layer(layer, case)


def torch_einsum(case: Case) -> Orders:
    """Plain torch, layer after layer, batched over tasks: one einsum."""

    def layer(R, G, L, B, p, q):
        return torch.einsum("tki,tbkl,tlj->tbij", R, G.reshape(-1, B, p, q), L).reshape(G.shape)

    return _layer_by_layer(layer, case)


def _layer_by_layer(layer: Callable[..., Tensor], case: Case) -> Orders:
    def forward(R, G, L):
        return [
            layer(R_i, G_i, L_i, *shape) for R_i, G_i, L_i, shape in zip(R, G, L, case.problems.shapes, strict=True)
        ]

    return through_autograd(forward, case)


def learn2learn_loop(case: Case) -> Orders:
    """learn2learn's own modules, task after task and layer after layer, as its `ParameterUpdate` calls them."""
    by_task = [_learn2learn_task(case, task) for task in range(len(case.G[0]))]
    return {order: lambda order=order: [run() for run in (orders[order] for orders in by_task)] for order in ORDERS}


def _learn2learn_task(case: Case, task: int) -> Orders:
    l2l = light_import()
    R, G, L, dY, ddR, ddG, ddL = ([X[task].detach().clone() for X in operand] for operand in case[1:])
    kronecker = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=False)
    update = l2l.optim.ParameterUpdate(G, kronecker).to(G[0].dtype)
    kronecker_factors_to(update, zip(R, L, strict=True))
    modules = update.transforms_modules
    left, right = [m.transform.left for m in modules], [m.transform.right for m in modules]
    for X in (*G, *dY):
        X.requires_grad_()
    inputs = [*left, *G, *right]
    # left = R^T, so the cotangent of its gradient is transposed too.
    cotangents = [*(kronecker_factors(X, X, psd=False)[0] for X in ddR), *ddG, *ddL]
    constant_dY = [X.detach() for X in dY]

    def forward() -> Outputs:
        return [module(g) for module, g in zip(modules, G, strict=True)]

    def no_graph() -> Outputs:
        with torch.no_grad():
            return forward()

    Y = forward()
    first = torch.autograd.grad(Y, inputs, dY, create_graph=True)
    return {
        "forward": no_graph,
        "backward": lambda: torch.autograd.grad(Y, inputs, constant_dY, retain_graph=True),
        "double_backward": lambda: torch.autograd.grad(first, [*inputs, *dY], cotangents, retain_graph=True),
    }


PROVIDERS: dict[str, Callable[[Case], Orders]] = {
    "kfo packed": kfo_packed,
    "kfo lists": kfo_lists,
    "torch matmul": torch_matmul,
    "torch einsum": torch_einsum,
    "learn2learn": learn2learn_loop,
}


def packed_outputs(name: str, order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The outputs of any provider as packed (tasks, n) tensors in the order of the op, for comparison."""
    problems, count = case.problems, len(case.problems)
    kinds = (
        [problems.packing]
        if order == "forward"
        else [problems.R, problems.packing, problems.L, problems.packing][: 3 if order == "backward" else 4]
    )
    if name == "kfo packed":
        return outputs
    if name == "learn2learn":
        outputs = [torch.stack(values) for values in zip(*outputs, strict=True)]
        if order != "forward":
            outputs[:count] = [X.mT for X in outputs[:count]]
    return [packing.pack(outputs[i * count : (i + 1) * count]) for i, packing in enumerate(kinds)]


def verify(cases: dict[str, Orders], case: Case, tolerance: float) -> None:
    """Compare every provider, order and output with the einsum.

    cases: the orders of every provider, by its name
    tolerance: largest difference, relative to the largest magnitude of that output

    Raises:
        AssertionError: a provider computes something else; says which, and by how much.
    """
    for order in ORDERS:
        truth = packed_outputs("torch einsum", order, cases["torch einsum"][order](), case)
        for name, orders in cases.items():
            got = packed_outputs(name, order, orders[order](), case)
            for i, (X, expected) in enumerate(zip(got, truth, strict=True)):
                error = ((X - expected).abs().max() / expected.abs().max()).item()
                if not error <= tolerance:
                    raise AssertionError(
                        f"{name}: output {i} of {order} is off by {error:.2e}, allowed {tolerance:.0e}"
                    )
