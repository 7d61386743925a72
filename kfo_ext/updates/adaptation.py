"""How an inner step adapts the meta-parameters of its update without a second backward pass through the model.

With the update U of packed gradients and its meta-parameters phi, step t of every task is

    g_t       = grad_theta loss(theta_t)
    phi_t     = phi_{t-1} - lr * grad_phi loss(theta_t)      (adapted updates, from the second step on)
    theta_t+1 = theta_t - lr * U(phi_t, g_t)

and since theta_t = theta_{t-1} - lr * U(phi_{t-1}, g_{t-1}),

    grad_phi loss(theta_t) = -lr * (VJP of U at (phi_{t-1}, g_{t-1}) applied to g_t)

exactly, as long as the loss depends on phi only through theta_t, nothing else moves theta, and all steps share one lr.
The evaluation of U that moved theta has that VJP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kfo_ext.updates.base import Phi, Update

# The gradient of each task's loss, packed (tasks, n), and a mask (1, n) if some parameters are unused.
Gradient = tuple[Tensor, Tensor | None]


def updated(update: Update, phi: Phi, gradient: Gradient, number: int) -> Tensor:
    """U of the gradient of step `number`, (tasks, n)."""
    G, used = gradient
    U = update.rule_at(phi, G, number)
    # A gradient is zero already where a parameter is unused.
    return U if used is None or U is G else U * used


def products(update: Update, learned: Iterable[Tensor], U: Tensor, G: Tensor, create_graph: bool) -> list[Tensor]:
    """Compute the VJP of U applied to G, by each of the given meta-parameters.

    Args:
        update: the update, for messages.
        learned: the meta-parameters that U was computed from, (tasks or 1, n_i) each.
        U: (tasks, n), packed updates.
        G: (tasks, n), the gradients that the VJP is applied to.
        create_graph: keep the graph of the result.

    Returns:
        One tensor per meta-parameter, of its shape.

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
    """Take the step of phi: add lr^2 times its VJP to each adapted row.

    Args:
        phi: the meta-parameters of the last step, (tasks or 1, n_i) each.
        learned: whether each of phi is adapted; the others are frozen, in training as in evaluation.
        products: the VJPs, one for each adapted row.
        lr: the inner learning rate.

    Returns:
        The meta-parameters of this step.
    """
    rest = iter(products)
    # Minus lr times (minus lr times the VJP).
    return tuple(row + lr**2 * next(rest) if is_learned else row for row, is_learned in zip(phi, learned))
