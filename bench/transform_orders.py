"""The three orders of the transform, each computed by several providers on the same operands.

    forward            Y from (R, G, L)
    backward           (dR, dG, dL) from (R, G, L, dY)
    double_backward    (dR, dG, dL, ddY) from (R, G, L, dY, ddR, ddG, ddL)

Every operand is a list, one tensor (tasks, ...) per parameter; every task has factors of its own. Where a provider goes
through autograd, the graph below the measured order is built beforehand and kept, so that the order alone is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.testing import OUTPUTS, Operands, family_of, random_operands, relative_error, run_order, truth
from kfo_ext.transform import Problems, transform

ORDERS = tuple(OUTPUTS)
Outputs = list[Tensor]
Orders = dict[str, Callable[[], Outputs]]


class Case(NamedTuple):
    """Operands of all orders, packed and as lists over the parameters.

    G, dY, ddG: (tasks, *parameter)
    R, ddR: (tasks, p, p)
    L, ddL: (tasks, q, q)
    """

    problems: Problems
    packed: Operands
    R: list[Tensor]
    G: list[Tensor]
    L: list[Tensor]
    dY: list[Tensor]
    ddR: list[Tensor]
    ddG: list[Tensor]
    ddL: list[Tensor]


def random_case(
    problems: Problems, tasks: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Case:
    """Random operands for the parameters of one network, every task with factors of its own."""
    packed = random_operands(problems.shapes, tasks, dtype=dtype, device=device, seed=seed)
    like = (problems.R, problems.packing, problems.L, problems.packing, problems.R, problems.packing, problems.L)
    lists = ([X.contiguous() for X in packing.unpack(operand)] for packing, operand in zip(like, packed))
    return Case(problems, packed, *lists)


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


def kfo_packed(case: Case, backend: str = "native") -> Orders:
    """Our three ops, packed operands in, packed outputs out.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it does not run on the operands' device.
    """
    family, flat = family_of(backend, case.packed.G.device), case.problems.flat
    return {order: lambda order=order: list(run_order(family, order, case.packed, flat)) for order in ORDERS}


def kfo_gradients_on(case: Case) -> Orders:
    """The public transform on packed operands that require gradients; every order can be differentiated again."""
    R, G, L, dY = (X.detach().requires_grad_() for X in case.packed[:4])
    cotangents = case.packed[4:7]

    def forward() -> Outputs:
        return [transform(R, G, L, case.problems)]

    Y = forward()
    first = torch.autograd.grad(Y, (R, G, L), dY, create_graph=True)
    return {
        "forward": forward,
        "backward": lambda: list(torch.autograd.grad(Y, (R, G, L), dY, create_graph=True)),
        "double_backward": lambda: list(torch.autograd.grad(first, (R, G, L, dY), cotangents, create_graph=True)),
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
    R, G, L, dY, ddR, ddG, ddL = ([X[task].detach().clone() for X in operand] for operand in case[2:])
    kronecker = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=False)
    update = l2l.optim.ParameterUpdate(G, kronecker).to(G[0])
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


def packed_already(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The outputs of a provider that packs."""
    return outputs


def packed_by_parameter(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs of a provider that gives, for each output in turn, one tensor (tasks, ...) per parameter."""
    count = len(case.problems)
    flat = [X.reshape(len(X), -1) for X in outputs]
    return [torch.cat(flat[i * count : (i + 1) * count], 1) for i in range(len(OUTPUTS[order]))]


def packed_by_task(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs of learn2learn's loop: a list per task, the gradient of left = R^T in the place of R's."""
    stacked = [torch.stack(values) for values in zip(*outputs, strict=True)]
    if order != "forward":
        stacked[: len(case.problems)] = [X.mT for X in stacked[: len(case.problems)]]
    return packed_by_parameter(order, stacked, case)


class Provider(NamedTuple):
    """A way to compute the orders, and what makes its outputs comparable.

    make: the orders of a case; ImportError or RuntimeError where it does not run here
    pack: (order, outputs, case) -> the outputs as packed (tasks, n) tensors, in the order of the op
    """

    make: Callable[[Case], Orders]
    pack: Callable[[str, Outputs, Case], list[Tensor]] = packed_by_parameter


PROVIDERS: dict[str, Provider] = {
    "kfo packed": Provider(kfo_packed, packed_already),
    "kfo lists": Provider(kfo_lists),
    "torch matmul": Provider(torch_matmul),
    "torch einsum": Provider(torch_einsum),
    "learn2learn": Provider(learn2learn_loop, packed_by_task),
}


def error_of(provider: Provider, order: str, outputs: Outputs, case: Case, expected: dict[str, Tensor]) -> float:
    """The largest error of one order's outputs, each relative to the largest magnitude of that output.

    expected: `kfo_ext.testing.truth` of the case
    """
    errors = []
    for X, name in zip(provider.pack(order, outputs, case), OUTPUTS[order], strict=True):
        if X.shape != expected[name].shape:
            return math.inf
        errors.append(relative_error(X, expected[name]))
    # Not max(), which loses a NaN.
    return torch.tensor(errors).max().item()


def verify(cases: dict[str, Orders], case: Case, tolerance: float) -> None:
    """Compare every provider of PROVIDERS, order and output with float64 truth.

    cases: the orders of every provider, by its name
    tolerance: largest difference, relative to the largest magnitude of that output

    Raises:
        AssertionError: a provider computes something else; says which, and by how much.
    """
    expected = truth(case.packed, case.problems.shapes)
    for name, orders in cases.items():
        for order in ORDERS:
            error = error_of(PROVIDERS[name], order, orders[order](), case, expected)
            if not error <= tolerance:
                raise AssertionError(f"{name}: {order} is off by {error:.2e}, allowed {tolerance:.0e}")
