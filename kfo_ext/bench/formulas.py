"""The orders written out in matrix products, without autograd: the best that plain torch can do, compiled or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfo_ext.bench.cases import Case, parameter_leaves
from kfo_ext.bench.orders import Orders, Outputs, as_matrices, plain_alone


def forward(R: Tensor, G: Tensor, L: Tensor) -> tuple[Tensor, ...]:
    """Compute Y of one parameter.

    Args:
        R: (tasks, p, p).
        G: (tasks, B, p, q).
        L: (tasks, q, q).

    Returns:
        Y, (tasks, B, p, q).
    """
    return (R.mT.unsqueeze(1) @ (G @ L.unsqueeze(1)),)


def backward(R: Tensor, G: Tensor, L: Tensor, dY: Tensor) -> tuple[Tensor, ...]:
    """dR, dG, dL of one parameter; dY is laid out like G."""
    M = R.unsqueeze(1) @ dY
    N = G @ L.unsqueeze(1)
    return (N @ dY.mT).sum(1), M @ L.mT.unsqueeze(1), (G.mT @ M).sum(1)


def double_backward(
    R: Tensor, G: Tensor, L: Tensor, dY: Tensor, ddR: Tensor, ddG: Tensor, ddL: Tensor
) -> tuple[Tensor, ...]:
    """dR, dG, dL, ddY of one parameter; each ddX is laid out like X."""
    R, L, ddR, ddL = (X.unsqueeze(1) for X in (R, L, ddR, ddL))
    M, S = R @ dY, ddR @ dY
    N, K = G @ L, ddG @ L + G @ ddL
    dG = S @ L.mT + M @ ddL.mT
    dL = (G.mT @ S + ddG.mT @ M).sum(1)
    return (K @ dY.mT).sum(1), dG, dL, ddR.mT @ N + R.mT @ K


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "forward": forward,
    "backward": backward,
    "double_backward": double_backward,
}


def operands_of(case: Case) -> dict[str, list[tuple[Tensor, ...]]]:
    """Collect the operands of each order's formula for each parameter.

    Args:
        case: the packed operands.

    Returns:
        Per order, the operands for each parameter, gradients as (tasks, B, p, q).

    Raises:
        LeftOut: the case is not the plain transform.
    """
    plain_alone(case)
    (R, L), G, dY, (ddR, ddL), ddG = as_matrices(parameter_leaves(case), case)
    operands = {
        "forward": (R, G, L),
        "backward": (R, G, L, dY),
        "double_backward": (R, G, L, dY, ddR, ddG, ddL),
    }
    return {order: list(zip(*forms, strict=True)) for order, forms in operands.items()}


def _orders(case: Case, wrap: Callable[[Callable], Callable]) -> Orders:
    def order(formula: Callable, layers: list[tuple[Tensor, ...]]) -> Callable[[], Outputs]:
        def whole(layers: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
            return [formula(*operands) for operands in layers]

        function = wrap(whole)

        def run() -> Outputs:
            # Grouped by kind: dR, dL, dG, ddY, each for all parameters.
            kinds = list(zip(*function(layers), strict=True))
            if len(kinds) > 1:
                kinds[1], kinds[2] = kinds[2], kinds[1]
            return [X for kind in kinds for X in kind]

        return run

    return {name: order(FORMULAS[name], layers) for name, layers in operands_of(case).items()}


def torch_formulas(case: Case) -> Orders:
    """Batched over tasks, layer after layer."""
    return _orders(case, lambda function: function)


def torch_formulas_compiled(case: Case) -> Orders:
    """As `torch_formulas`, with all layers of one order in one compiled graph."""
    torch.compiler.reset()
    return _orders(case, lambda function: torch.compile(function, fullgraph=True, dynamic=False))
