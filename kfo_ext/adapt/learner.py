"""MAML with learned updates: the inner loop of a whole meta-batch, differentiable end to end.

Inner step t of every task, with the learned update U and its meta-parameters phi (paper, Algorithm 1 and equation 22):

    g_t       = grad_theta loss(theta_t)
    phi_t     = phi_{t-1} - lr * grad_phi loss(theta_t)      (adapt_update, from the second step on)
    theta_t+1 = theta_t - lr * U(phi_t, g_t)

The gradient by phi needs no second backward pass through the model: theta_t = theta_{t-1} - lr * U(phi_{t-1}, g_{t-1}),
hence

    grad_phi loss(theta_t) = -lr * (VJP of U at (phi_{t-1}, g_{t-1}) applied to g_t)

exactly, because the loss holds phi only through theta_t and the step is plain gradient descent with one scalar lr.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint as checkpointed

from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.transform.packing import Packing
from kfo_ext.updates import KFO

from .calls import BufferReplay, exclusive
from .checks import (
    adapted_packing,
    check_batch,
    check_modules,
    check_rate,
    check_steps,
    check_structure,
    check_update,
    foreign_tensor,
)
from .losses import Loss, ignored_target, task_losses
from .result import MetaResult, task_accuracies
from .routes import ROUTES, Route, TaskByTask, Vmapped, tasks_at_once
from .vmapped import Plan, Unserved, signature


def _eager(forward: Callable) -> Callable:
    """The forward, left out of torch.compile: a compiled region has no second derivative."""

    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        # Only a process that compiles has loaded dynamo.
        return (torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward)(*args)

    return run


class MAML(nn.Module):
    """Model-agnostic meta-learning of a model and, with `update`, of the update rule it adapts by.

    Args:
        model: any module whose forward takes one tensor of examples; batch norm must use batch statistics.
        update: a KFO made for the adapted parameters, or None for plain gradient descent.
        lr: the inner learning rate.
        steps: inner steps.
        adapt_update: adapt the update's meta-parameters per task as well, from the second step on.
        first_order: treat the model's gradients as constants (FOMAML).
        loss: of (output, target), the mean over one task's examples; None is torch's cross-entropy, for integer labels.
        checkpoint: recompute each inner step in the outer backward pass: memory does not grow with their number. Random
            numbers and buffers are those of the first computation.
        allow_unused: parameters that a task's loss does not depend on stay as they are.
        allow_nograd: parameters that do not require a gradient stay as they are.
        route: how all tasks are computed: "vmap", in one forward, several times as fast, for networks whose functions
            are all in `kfo_ext.adapt.verified`; "loop", one after the other; "auto", by vmap where it serves the
            network. The property `route` says which was taken, and why.
        bf16: run the model's forward under torch.autocast in bfloat16, and so its derivatives; parameters, gradients,
            updates, features for a head and losses stay in float32.

    Several threads may call one learner: task by task, their forwards take turns. Meanwhile read the model's parameters
    through the learner, since the model itself may hold those of a task. Under torch.compile a learner runs eagerly.

    Raises:
        ValueError: a number out of range, a frozen parameter without its flag, an update made for other parameters,
            `adapt_update` without an update.
        TypeError: an lr, update or loss of another type, parameters of several dtypes.

    Source: paper, equations 1 and 22, Algorithm 1 (with the lr that its line 8 misses).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        update: KFO | None = None,
        lr: float,
        steps: int,
        adapt_update: bool = False,
        first_order: bool = False,
        loss: Loss | None = None,
        checkpoint: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        route: str = "auto",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if update is not None and not isinstance(update, KFO):
            raise TypeError(f"update: expected a KFO or None, got {type(update).__name__}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a function of (output, target) or None, got {loss!r}")
        if route not in ROUTES:
            raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
        self.lr = check_rate(lr)
        self.steps = check_steps(steps)
        if adapt_update and update is None:
            raise ValueError("adapt_update: expected an update to adapt, got update=None")
        self.model = model
        self.update = update
        self.adapt_update = adapt_update
        self.first_order = first_order
        self.loss = loss
        self.checkpoint = checkpoint
        self.allow_unused = allow_unused
        self._wanted = route
        self._chosen: dict[str, str] = {}
        self._plans: dict[tuple, Plan] = {}
        self.bf16 = bf16
        self.packing = adapted_packing(self.adapted, allow_nograd)
        if update is not None:
            check_update(update, self.packing)

    # What of the model is adapted, as `route` says it.
    _part = "model"

    @property
    def adapted(self) -> nn.Module:
        """The module whose parameters the inner loop adapts."""
        return self.model

    @property
    def route(self) -> str:
        """How the last call computed all tasks: "vmap", or "loop" and why; before any call, what was asked for."""
        routes = set(self._chosen.values() or [self._wanted])
        return routes.pop() if len(routes) == 1 else ", ".join(f"{part}: {how}" for part, how in self._chosen.items())

    def _choose(self, part: str, module: nn.Module, packing: Packing, theta: Tensor, x: Tensor) -> Route:
        """The route of a module's outputs, by a plan that holds while modules, modes, hooks and shapes stay.

        part: what of the model it is, for `route`.
        theta: (tasks, n), packed parameters.
        x: (tasks, n, ...), the examples.
        """
        loop, reason = TaskByTask(module, packing), ""
        if self._wanted != "loop":
            route = Vmapped(module, packing)
            key = (signature(module), x.shape[1:], x.dtype, x.device, torch.is_autocast_enabled(x.device.type))
            if key not in self._plans:
                with exclusive(), self._precision(x):
                    self._plans[key] = route.planned(theta[:1], x[:1])
            route.plan = self._plans[key]
            reason = route.plan.reason
            if not reason:
                self._chosen = {**self._chosen, part: "vmap"}
                return route
            if self._wanted == "vmap":
                raise ValueError(f"route: expected a network that vmap can serve: {reason}")
        self._chosen = {**self._chosen, part: f"loop: {reason}" if reason else "loop"}
        return loop

    def _at_once(self, theta: Tensor, batch: TaskBatch) -> int:
        """How many tasks of the batch are to be in one graph."""
        route = self._choose("model", self.model, self.packing, theta, batch.support.x)
        return tasks_at_once(route, batch.support.x, max(part.x.shape[1] for part in batch))

    def _precision(self, x: Tensor) -> AbstractContextManager:
        """What the model's forward of x runs under."""
        # Casts are not kept from one forward to the next: a captured graph would replay without them.
        return torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext()

    # Another thread may have put a task's parameters in the place of the model's own.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, safe while other threads call the learner; so are `parameters` and `state_dict`."""
        with exclusive():
            return iter(list(super().named_parameters(*args, **kwargs)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As nn.Module's."""
        with exclusive():
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        with exclusive():
            return super().load_state_dict(*args, **kwargs)

    def inputs(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """What the adapted module sees of the support and query examples, (tasks, n, ...) each."""
        return batch.support.x, batch.query.x

    @_eager
    def forward(self, batch: TaskBatch) -> MetaResult:
        """Adapts to every task's support examples and measures its query examples.

        Under torch.no_grad() it evaluates: the inner loop still differentiates, but nothing of its graph is kept.

        Args:
            batch: support.x (tasks, n, ...), support.y (tasks, n, ...), the same for query.

        Raises:
            ValueError: no task, support and query of different numbers of tasks, bf16 for parameters not of float32,
                a model whose parameters are others than when the learner was built, a target that needs a named loss.
            TypeError: a batch that is no TaskBatch of dense tensors, or whose tensors the model cannot take.
            RuntimeError: called in inference mode, or a normalisation would use running statistics.
        """
        tasks = check_batch(batch)
        outer = torch.is_grad_enabled()
        with exclusive():
            check_modules(self.model)
            parameters = check_structure(self.adapted, self.packing)
        if self.bf16 and parameters[0].dtype != torch.float32:
            raise ValueError(
                f"bf16: expected parameters of torch.float32, which autocast rounds, got {parameters[0].dtype}"
            )
        if self.loss is None and batch.support.y.is_floating_point():
            raise ValueError(
                "loss: expected integer targets for the default cross-entropy, got "
                f"{batch.support.y.dtype}; pass a loss, such as mse_loss, or cross_entropy for probabilities"
            )
        with torch.enable_grad():
            theta = self.packing.pack(parameters)
        try:
            # Groups of about the same size.
            groups = -(-tasks // self._at_once(theta, batch))
            parts = [self._group(theta, group, parameters, outer) for group in batch.split(-(-tasks // groups))]
        except Unserved as reason:
            raise RuntimeError(f"route: {reason}; route='loop' serves it") from None
        except (RuntimeError, TypeError) as error:
            if reason := foreign_tensor(batch, parameters[0]):
                raise TypeError(reason) from error
            raise
        support_losses, losses = (torch.cat([part[i] for part in parts], -1) for i in range(2))
        accuracies = [part[2] for part in parts]
        with torch.set_grad_enabled(outer):
            loss = losses.mean()
        missing = any(accuracy is None for accuracy in accuracies)
        return MetaResult(loss, support_losses, losses.detach(), None if missing else torch.cat(accuracies))

    def _group(
        self, theta: Tensor, batch: TaskBatch, parameters: list[Tensor], outer: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Support losses (steps, tasks), query losses (tasks,) and accuracies (tasks,) of tasks in one graph."""
        support_x, query_x = self.inputs(batch)
        route, start = self._choose(self._part, self.adapted, self.packing, theta, support_x), theta
        with torch.enable_grad():
            phi = self.update.phi if self.update is not None else ()
            support = Examples(support_x, batch.support.y)
            theta, support_losses = self._adapt(route, theta.expand(len(support_x), -1), phi, support, outer)
        with torch.set_grad_enabled(outer):
            outputs, losses = self._losses(route, route.leaves(theta), Examples(query_x, batch.query.y), outer)
        route.finish(start, parameters)
        return support_losses, losses, task_accuracies(outputs, batch.query.y, ignored_target(self.loss))

    def _adapt(
        self, route: Route, theta: Tensor, phi: tuple[Tensor, ...], support: Examples, outer: bool
    ) -> tuple[Tensor, Tensor]:
        # Factors that are frozen are not adapted either, in training as in evaluation.
        learned = [row.requires_grad for row in phi]
        last: tuple[Tensor, Tensor | None] | None = None
        step_losses = []
        for _ in range(self.steps):
            if not outer:
                # Evaluation: cut the graph between steps, so that one step's is all that ever lives.
                theta = theta.detach().requires_grad_()
                phi = tuple(row.detach().requires_grad_(needed) for row, needed in zip(phi, learned))
            step = self._checkpointed_step if self.checkpoint and outer else self._step
            theta, last, losses, *phi = step(route, theta, last, support, outer, *phi)
            step_losses.append(losses)
        return theta, torch.stack(step_losses)

    def _checkpointed_step(self, route: Route, *state: Any) -> tuple:
        """`_step`, of which nothing is kept but its arguments."""
        first: list[Tensor] = []

        def same(losses: Tensor) -> None:
            if not first:
                first.append(losses)
            elif not torch.allclose(losses, first[0], rtol=1e-4 if losses.is_cuda else 0, atol=0, equal_nan=True):
                # A CUDA library may sum in another order the second time.
                raise RuntimeError(
                    "checkpoint: the model computed other losses when an inner step was recomputed: it changes what it "
                    "reads, and that is no buffer; use checkpoint=False"
                )

        step, again = functools.partial(self._step, observe=same), BufferReplay(self)
        return checkpointed(step, route, *state, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

    def _step(
        self,
        route: Route,
        theta: Tensor,
        last: tuple[Tensor, Tensor | None] | None,
        support: Examples,
        outer: bool,
        *phi: Tensor,
        observe: Callable[[Tensor], None] | None = None,
    ) -> tuple:
        """One inner step of every task: (theta, (G, used), losses, *phi); `last` is (G, used) of the step before."""
        leaves = route.leaves(theta)
        _, losses = self._losses(route, leaves, support, outer)
        if observe is not None:
            observe(losses.detach())
        G, used = self._gradients(route, leaves, losses, create_graph=outer and not self.first_order)
        U = G
        if self.update is not None:
            if self.adapt_update and last is not None:
                phi = self._adapt_phi(phi, last, G, outer)
            U = self._used_update(phi, G, used)
        return theta - self.lr * U, (G, used), losses.detach(), *phi

    def _used_update(self, phi: tuple[Tensor, ...], G: Tensor, used: Tensor | None) -> Tensor:
        U = self.update.rule(phi, G)
        return U if used is None else U * used

    def _adapt_phi(
        self, phi: tuple[Tensor, ...], last: tuple[Tensor, Tensor | None], G: Tensor, outer: bool
    ) -> tuple[Tensor, ...]:
        # One row per task from here on: each task's factors go their own way.
        phi = tuple(row.expand(len(G), -1) for row in phi)
        learned = [row for row in phi if row.requires_grad]
        if not learned:
            return phi
        # U is evaluated again, not kept from the last step, so that a checkpointed step depends on tensors alone.
        U = self._used_update(phi, *last)
        products = iter(torch.autograd.grad(U, learned, grad_outputs=G, create_graph=outer))
        # Minus lr times (minus lr times the VJP).
        return tuple(row + self.lr**2 * next(products) if row.requires_grad else row for row in phi)

    def _gradients(
        self, route: Route, leaves: list[Tensor], losses: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Packed gradients (tasks, n) of each task's loss, and a mask where some are unused."""
        if not losses.requires_grad:
            raise ValueError("loss: does not depend on any parameter (was it detached, or computed under no_grad?)")
        grads = torch.autograd.grad(losses.sum(), leaves, create_graph=create_graph, allow_unused=True)
        used = None
        if any(grad is None for grad in grads):
            if not self.allow_unused:
                name = route.name(next(i for i, grad in enumerate(grads) if grad is None))
                raise ValueError(
                    f"parameter {name!r}: the loss does not depend on it; allow_unused=True leaves it as it is"
                )
            present = [torch.full_like(leaf, grad is not None) for leaf, grad in zip(leaves, grads)]
            used = route.packed(present, len(losses))
            grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]
        return route.packed(grads, len(losses)), used

    def _losses(
        self, route: Route, leaves: Sequence[Tensor], examples: Examples, outer: bool
    ) -> tuple[Tensor | list[Any], Tensor]:
        """The outputs of the tasks, and their losses (tasks,)."""
        differentiable = outer and not self.first_order
        with exclusive(differentiable), self._precision(examples.x):
            outputs = route.outputs(leaves, examples.x)
        if self.bf16:
            outputs = tree_map_only(Tensor, lambda X: X.float() if X.is_floating_point() else X, outputs)
        loss = F.cross_entropy if self.loss is None else self.loss
        return outputs, task_losses(loss, outputs, examples.y)
