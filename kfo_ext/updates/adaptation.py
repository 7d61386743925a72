"""How an inner step adapts the meta-parameters of its update without a second backward pass through the model.

With the update U of packed gradients and its meta-parameters phi, step t of every task is

    g_t       = grad_theta loss(theta_t)
    phi_t     = phi_{t-1} - lr * grad_phi loss(theta_t)      (adapted updates, from the second step on)
    theta_t+1 = theta_t - lr * U(phi_t, g_t)

and since theta_t = theta_{t-1} - lr * U(phi_{t-1}, g_{t-1}),

    grad_phi loss(theta_t) = -lr * (VJP of U at (phi_{t-1}, g_{t-1}) applied to g_t)

exactly, as long as the loss holds phi only through theta_t, nothing else moves theta, and all steps have one lr. The
evaluation of U that has moved theta has that VJP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kfo_ext.updates.base import Phi, Update

# Of each task's loss, packed (tasks, n), and a mask where some parameters are unused.
Gradient = tuple[Tensor, Tensor | None]


def updated(update: Update, phi: Phi, gradient: Gradient, number: int) -> Tensor:
    """U of the gradient of that step, (tasks, n)."""
    G, used = gradient
    U = update.rule_at(phi, G, number)
    # A gradient is zero already where a parameter is unused.
    return U if used is None or U is G else U * used


def products(update: Update, learned: Iterable[Tensor], U: Tensor, G: Tensor, create_graph: bool) -> list[Tensor]:
    """The VJP of U applied to G, by each of the meta-parameters that U was computed from.

    Raises:
        ValueError: U does not depend on one of them.
    """
    found = torch.autograd.grad(U, list(learned), grad_outputs=G, create_graph=create_graph, allow_unused=True)
    if any(product is None for product in found):
        raise ValueError(
            f"adapt_update: the rule of {type(update).__name__} does not depend on all of the phi that it is "
            "given; take meta-parameters from its argument `phi`, never from self"
        )
    return list(found)


def adapted(phi: Phi, learned: Iterable[bool], products: Iterable[Tensor], lr: float) -> Phi:
    """phi after its own step.

    learned: which of phi are adapted; the others are frozen, in training as in evaluation.
    products: one for each of those.
    """
    rest = iter(products)
    # Minus lr times (minus lr times the VJP).
    return tuple(row + lr**2 * next(rest) if is_learned else row for row, is_learned in zip(phi, learned))
