"""The transform in plain torch: short, correct to any order, the ground truth of every kernel.

`transform` also runs it in forward mode, and under the other transforms for which operators have no rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _sizes(shapes: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(shapes[i], shapes[i + 1], shapes[i + 2]) for i in range(0, len(shapes), 3)]


def transform(R: Tensor, G: Tensor, L: Tensor, shapes: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Return Y = R^T G L (+ bias) for every problem of every task.

    Args:
        R: (tasks or 1, sum p*p).
        G: (tasks, sum B*p*q).
        L: (tasks or 1, sum q*q).
        shapes: flat (B, p, q) triples.
        bias: (tasks or 1, sum p*q), broadcast over B.

    Returns:
        Y: (tasks, sum B*p*q).
    """
    out = _products("tki,tbkl,tlj->tbij", R, G, L, shapes)
    return out if bias is None else out + expand_bias(bias, shapes)


def adjoint(R: Tensor, G: Tensor, L: Tensor, shapes: Sequence[int]) -> Tensor:
    """R G L^T for every problem of every task; operands as for `transform`."""
    return _products("tik,tbkl,tjl->tbij", R, G, L, shapes)


def _products(equation: str, R: Tensor, G: Tensor, L: Tensor, shapes: Sequence[int]) -> Tensor:
    sizes = _sizes(shapes)
    if not sizes:
        return G.clone()
    pieces = zip(
        sizes,
        R.split([p * p for _, p, _ in sizes], dim=1),
        G.split([B * p * q for B, p, q in sizes], dim=1),
        L.split([q * q for _, _, q in sizes], dim=1),
    )
    products = [
        torch.einsum(
            equation,
            R_i.reshape(R.shape[0], p, p),
            G_i.reshape(G.shape[0], B, p, q),
            L_i.reshape(L.shape[0], q, q),
        )
        for (B, p, q), R_i, G_i, L_i in pieces
    ]
    return torch.cat([product.flatten(1) for product in products], dim=1)


def expand_bias(bias: Tensor, shapes: Sequence[int]) -> Tensor:
    """(rows, sum p*q) -> (rows, sum B*p*q): each problem's bias repeated over B."""
    sizes = _sizes(shapes)
    pieces = bias.split([p * q for _, p, q in sizes], dim=1)
    return torch.cat([piece.repeat(1, B) for (B, _, _), piece in zip(sizes, pieces)], dim=1)


def sum_over_B(dY: Tensor, shapes: Sequence[int], rows: int) -> Tensor:
    """(tasks, sum B*p*q) -> (rows, sum p*q): the gradient of a bias with 1 or `tasks` rows; `expand_bias`'s adjoint."""
    sizes = _sizes(shapes)
    pieces = dY.split([B * p * q for B, p, q in sizes], dim=1)
    out = torch.cat([piece.reshape(dY.shape[0], B, p * q).sum(1) for (B, p, q), piece in zip(sizes, pieces)], dim=1)
    return out if rows == dY.shape[0] else out.sum(0, keepdim=True)
