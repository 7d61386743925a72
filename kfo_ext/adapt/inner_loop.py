"""The inner loop of a group of tasks: packed parameters in, adapted ones out, differentiable end to end.

`kfo_ext.updates.adaptation` defines the step and the gradient with respect to the update's meta-parameters (paper,
Algorithm 1 and equation 22). U is evaluated once per step: the evaluation that moves theta has the VJP that adapts phi.
With checkpoint, where steps are recomputed, each gradient inside a step evaluates it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from kfo_ext.updates import Update
from kfo_ext.updates.adaptation import Gradient, adapted, products, updated
from kfo_ext.updates.base import Phi
from kfo_ext.updates.checks import check_step

from .calls import BufferReplay
from .routes import Route


class InnerLoop(NamedTuple):
    """What stays the same over the steps.

    Attributes:
        route: how outputs and gradients are computed.
        losses: the support losses (tasks,) as a function of the leaves of theta.
        update: as for `MAML`.
        lr: as for `MAML`.
        adapt_update: as for `MAML`.
        first_order: as for `MAML`.
        allow_unused: as for `MAML`.
        outer: whether the result is differentiated; otherwise the graph is cut between the steps.
        replayed: the module whose buffers are restored for a recomputed step; None keeps every step's graph.
    """

    route: Route
    losses: Callable[[Sequence[Tensor]], Tensor]
    update: Update
    lr: float
    adapt_update: bool
    first_order: bool
    allow_unused: bool
    outer: bool
    replayed: nn.Module | None

    def run(self, theta: Tensor, phi: Phi, steps: int) -> tuple[Tensor, Tensor]:
        """Run the inner loop.

        Args:
            theta: (tasks, n), packed parameters.
            phi: (1, n) each, the update's meta-parameters.
            steps: the number of steps.

        Returns:
            The adapted theta (tasks, n), and the support losses (steps, tasks) before each step.

        Raises:
            ValueError: there are more steps than the update has meta-parameters for.
        """
        if steps and self.update.steps is not None:
            # Checks the last step first, so that nothing is computed in vain.
            check_step(steps - 1, self.update.steps)
        if self.adapt_update and steps > 1:
            # Each task adapts meta-parameters of its own.
            phi = tuple(row.expand(len(theta), -1) for row in phi)
        step: Callable = self._step
        if self.replayed is not None and self.outer:
            step = partial(self._replayed_step, self.replayed)
        gradient: Gradient | None = None
        step_losses = []
        for number in range(steps):
            theta, phi, losses, gradient = step(number, theta, phi, gradient)
            step_losses.append(losses)
        if gradient is None:
            return theta, theta.new_empty((0, len(theta)))
        U = updated(self.update, phi, gradient, steps - 1)
        return torch.add(theta, U, alpha=-self.lr), torch.stack(step_losses)

    def _step(
        self,
        number: int,
        theta: Tensor,
        phi: Phi,
        last: Gradient | None,
        observe: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Phi, Tensor, Gradient]:
        """Move theta by the update of its last gradient, then compute the next gradient, which moves phi.

        One evaluation of U serves both. A step begins with it, so that a step depends only on its arguments.

        Args:
            number: the step's number, 0 for the first.
            theta: (tasks, n), packed parameters.
            phi: (1, n) or (tasks, n) each, meta-parameters.
            last: the gradient at theta, None in the first step.
            observe: called with the losses (tasks,).

        Returns:
            theta, phi, the support losses (tasks,) at theta, and their gradient.
        """
        U = None
        if not self.outer:
            phi = tuple(row.detach().requires_grad_(row.requires_grad) for row in phi)
        if last is not None:
            U = updated(self.update, phi, last, number - 1)
            theta = torch.add(theta, U, alpha=-self.lr)
        if not self.outer:
            theta = theta.detach().requires_grad_()
        leaves = self.route.leaves(theta)
        losses = self.losses(leaves)
        if observe is not None:
            observe(losses.detach())
        gradient = self._gradient(leaves, losses)
        if U is not None and self.adapt_update:
            phi = self._adapted(phi, U, gradient[0])
        return theta, phi, losses.detach(), gradient

    def _replayed_step(
        self, module: nn.Module, number: int, theta: Tensor, phi: Phi, last: Gradient | None
    ) -> tuple[Tensor, Phi, Tensor, Gradient]:
        """`_step` that keeps only its arguments for the backward pass, which recomputes the rest."""
        first: list[Tensor] = []

        def same(losses: Tensor) -> None:
            if not first:
                first.append(losses)
            elif not torch.allclose(losses, first[0], rtol=1e-4 if losses.is_cuda else 0, atol=0, equal_nan=True):
                # A CUDA library may sum in another order the second time.
                raise RuntimeError(
                    "checkpoint: the model computed other losses when an inner step was recomputed: it changes state "
                    "that is no buffer; use checkpoint=False"
                )

        step, again = partial(self._step, observe=same), BufferReplay(module)
        return checkpointed(
            step, number, theta, phi, last, use_reentrant=False, context_fn=lambda: (nullcontext(), again)
        )

    def _adapted(self, phi: Phi, U: Tensor, G: Tensor) -> Phi:
        """The meta-parameters after their own step, from the update U that moved theta and the gradient G there."""
        learned = [row.requires_grad for row in phi]
        if not any(learned):
            return phi
        found = products(self.update, (row for row in phi if row.requires_grad), U, G, create_graph=self.outer)
        return adapted(phi, learned, found, self.lr)

    def _gradient(self, leaves: Sequence[Tensor], losses: Tensor) -> Gradient:
        if not losses.requires_grad:
            raise ValueError("loss: does not depend on any parameter (was it detached, or computed under no_grad?)")
        create_graph = self.outer and not self.first_order
        grads: list[Any] = list(torch.autograd.grad(losses.sum(), leaves, create_graph=create_graph, allow_unused=True))
        used = None
        if any(grad is None for grad in grads):
            if not self.allow_unused:
                name = self.route.name(next(i for i, grad in enumerate(grads) if grad is None))
                raise ValueError(
                    f"parameter {name!r}: the loss does not depend on it; allow_unused=True leaves it as it is"
                )
            present = [torch.full_like(leaf, grad is not None) for leaf, grad in zip(leaves, grads)]
            used = self.route.packed(present, len(losses))
            grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]
        return self.route.packed(grads, len(losses)), used
