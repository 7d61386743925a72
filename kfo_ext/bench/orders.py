"""Derives the three orders from an update in some form, and packs their outputs.

If a provider uses autograd, the graph below the measured order is built at its first call and kept, so that only the
order is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from kfo_ext.bench.cases import ORDERS, Case, Form, Leaves, output_count, parameter_leaves, task_leaves
from kfo_ext.testing import relative_error

# (R, G, L) -> Y, each a tensor per parameter.
Transform = Callable[[Form, Form, Form], Form]
# (phi, G) -> U, in one form.
Rule = Callable[[list[Form], Form], Form]
Outputs = list[Tensor]
Orders = dict[str, Callable[[], Outputs]]


class LeftOut(RuntimeError):
    """A provider does not apply to a case; the message gives the reason."""


def plain_alone(case: Case) -> None:
    """Check that a case is the plain transform, for providers that compute nothing else.

    Args:
        case: the packed operands.

    Raises:
        LeftOut: the case is another update.
    """
    if not case.plain:
        raise LeftOut("written for the plain transform alone")


def composed(transform: Transform, psd: bool, tanh: Callable = torch.tanh) -> Rule:
    """Compose the update that `KFO` computes from any transform; independent of `KFO`, so that it can serve as truth.

    With psd R^T R G L^T L = R^T (R G L^T) L; with hidden layers g + K_h(tanh(... K_1(g))), the last one without psd.

    Args:
        transform: (R, G, L) -> Y.
        psd: whether the update has psd.
        tanh: the activation between layers.

    Returns:
        The update, (phi, G) -> U.
    """

    def rule(phi: list[Form], G: Form) -> Form:
        H, last = G, len(phi) - 2
        for i in range(0, len(phi), 2):
            R, L = phi[i], phi[i + 1]
            if i:
                H = [tanh(X) for X in H]
            if psd and (last == 0 or i < last):
                H = transform([X.mT for X in R], H, [X.mT for X in L])
            H = transform(R, H, L)
        return H if last == 0 else [g + h for g, h in zip(G, H)]

    return rule


def through_autograd(rule: Rule, leaves: Leaves, create_graph: bool = False, phi: list[Form] | None = None) -> Orders:
    """Compute all orders of a differentiable update by autograd.

    Args:
        rule: the update.
        leaves: the operands in the update's form.
        create_graph: keep gradients on at every order, as within a meta-iteration.
        phi: the tensors that the rule reads, if it keeps its own.

    Returns:
        A call per order.
    """

    def variables(form: Form) -> Form:
        return [X.detach().requires_grad_() for X in form]

    phi = phi or [variables(form) for form in leaves.phi]
    G, dY = variables(leaves.G), variables(leaves.dY)
    inputs = [X for form in (*phi, G) for X in form]
    cotangents = [X for form in (*leaves.ddphi, leaves.ddG) for X in form]
    keep = {"create_graph": True} if create_graph else {"retain_graph": True}

    @cache
    def value() -> Form:
        return rule(phi, G)

    @cache
    def first() -> tuple[Tensor, ...]:
        return torch.autograd.grad(value(), inputs, dY, create_graph=True)

    def forward() -> Outputs:
        with torch.set_grad_enabled(create_graph):
            return rule(phi, G)

    return {
        "forward": forward,
        "backward": lambda: list(torch.autograd.grad(value(), inputs, dY if create_graph else leaves.dY, **keep)),
        "double_backward": lambda: list(torch.autograd.grad(first(), [*inputs, *dY], cotangents, **keep)),
    }


def task_after_task(make: Callable[[Leaves], Orders], case: Case) -> Orders:
    """The orders of a loop over tasks; the outputs of an order are those of the first task, then of the next."""
    leaves = parameter_leaves(case)
    by_task = [make(task_leaves(leaves, task)) for task in range(len(case.G))]

    def run(order: str) -> Outputs:
        return [X for orders in by_task for X in orders[order]()]

    return {order: partial(run, order) for order in ORDERS}


def packed_already(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The outputs of a provider that packs them."""
    return outputs


def packed_by_parameter(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs of a provider that returns, for each output in turn, one tensor (tasks, ...) per parameter."""
    count = len(case.problems)
    flat = [X.reshape(len(X), -1) for X in outputs]
    return [torch.cat(flat[i * count : (i + 1) * count], 1) for i in range(output_count(order, case))]


def packed_by_task(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs of a loop over tasks."""
    count = len(case.problems) * output_count(order, case)
    stacked = [torch.stack(outputs[i::count]) for i in range(count)]
    return packed_by_parameter(order, stacked, case)


def matmul(R: Form, G: Form, L: Form) -> Form:
    """Layer after layer, two broadcast matmuls each; any leading dimensions."""
    return [(X.mT.unsqueeze(-3) @ (g @ Z.unsqueeze(-3))) for X, g, Z in zip(R, G, L, strict=True)]


def truth(case: Case) -> dict[str, list[Tensor]]:
    """Per order, its packed outputs in float64."""
    wide = case.double()
    leaves = as_matrices(parameter_leaves(wide), case)
    orders = through_autograd(composed(matmul, case.psd), leaves)
    return {order: [X.detach() for X in packed_by_parameter(order, orders[order](), wide)] for order in ORDERS}


def as_matrices(leaves: Leaves, case: Case) -> Leaves:
    """G, dY and ddG as (..., B, p, q) matrices instead of the parameters' shapes."""
    lead = leaves.phi[0][0].dim() - 2

    def matrices(form: Form) -> Form:
        return [X.reshape(*X.shape[:lead], *shape) for X, shape in zip(form, case.problems.shapes, strict=True)]

    return leaves._replace(G=matrices(leaves.G), dY=matrices(leaves.dY), ddG=matrices(leaves.ddG))


def error_of(pack: Callable, order: str, outputs: Outputs, case: Case, expected: dict[str, list[Tensor]]) -> float:
    """Compute the largest error of one order's outputs, each relative to the largest magnitude of that output.

    Args:
        pack: the provider's.
        order: the order.
        outputs: of the provider.
        case: the packed operands.
        expected: `truth` of the case.

    Returns:
        The error; infinity if the shapes differ.
    """
    packed = pack(order, outputs, case)
    if [X.shape for X in packed] != [X.shape for X in expected[order]]:
        return math.inf
    # Not max(), which loses a NaN.
    return torch.tensor([relative_error(X, Y) for X, Y in zip(packed, expected[order])]).max().item()
