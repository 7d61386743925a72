"""MAML with learned updates: adapts a model to all tasks of a meta-batch, and measures what that gave."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from kfo_ext.packing import Packing
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.updates import Update

from .adapted import Adapted
from .calls import exclusive
from .checks import (
    adapted_packing,
    check_alike,
    check_batch,
    check_modules,
    check_rate,
    check_steps,
    check_structure,
    check_update,
    foreign_tensor,
)
from .inner_loop import InnerLoop
from .losses import Loss, ignored_target, task_losses
from .result import MetaResult, task_accuracies
from .routes import ROUTES, Route, TaskByTask, Vmapped, tasks_at_once
from .vmapped import Plan, Unserved, signature


def _eager(forward: Callable) -> Callable:
    """The forward, left out of torch.compile: a compiled region has no second derivative."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Only a process that compiles has loaded dynamo.
        return (torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward)(*args, **kwargs)

    return run


PLANS = 8


class MAML(nn.Module):
    """Model-agnostic meta-learning of a model and, with `update`, of the update rule it adapts by.

    Args:
        model: any module whose forward takes one tensor of examples; batch norm must use batch statistics.
        update: an `Update` made for the adapted parameters, such as a KFO, or None for plain gradient descent.
        lr: the inner learning rate.
        steps: inner steps.
        adapt_update: adapt the update's meta-parameters per task as well, from the second step on.
        first_order: treat the model's gradients as constants (FOMAML).
        loss: of (output, target), the mean over one task's examples; None is torch's cross-entropy, for integer labels.
        checkpoint: recompute each inner step in the outer backward pass: memory does not grow with their number. Random
            numbers and buffers are those of the first computation.
        allow_unused: parameters that a task's loss does not depend on stay as they are.
        allow_nograd: parameters that do not require a gradient stay as they are.
        route: how all tasks are computed: "vmap", in one forward, usually several times as fast, for networks whose
            functions are all in `kfo_ext.adapt.verified`; "loop", one after the other; "auto", by vmap where it serves
            the network. The property `route` says which was taken, and why.
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
        update: Update | None = None,
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
        if update is not None and not isinstance(update, Update):
            raise TypeError(f"update: expected an Update, such as KFO, or None, got {type(update).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {model!r}")
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
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
        reason = ""
        if self._wanted != "loop":
            with exclusive():
                route = Vmapped(module, packing)
            key = (signature(module), x.shape[1:], x.dtype, x.device, torch.is_autocast_enabled(x.device.type))
            if key not in self._plans:
                with exclusive(), self._precision(x):
                    plan = route.planned(theta[:1], x[:1])
                # A few are enough for shapes that alternate; plans of modules that are gone must not pile up.
                self._plans = {**dict(list(self._plans.items())[-(PLANS - 1) :]), key: plan}
            route.plan = self._plans[key]
            reason = route.plan.reason
            if not reason:
                self._chosen = {**self._chosen, part: "vmap"}
                return route
            if self._wanted == "vmap":
                raise ValueError(f"route: expected a network that vmap can serve: {reason}")
        self._chosen = {**self._chosen, part: f"loop: {reason}" if reason else "loop"}
        with exclusive():
            return TaskByTask(module, packing)

    def _at_once(self, theta: Tensor, batch: TaskBatch) -> int:
        """How many tasks of the batch are to be in one graph."""
        route = self._choose("model", self.model, self.packing, theta, batch.support.x)
        return tasks_at_once(route, batch.support.x, max(part.x.shape[1] for part in batch))

    def _precision(self, x: Tensor) -> AbstractContextManager:
        """What the model's forward of x runs under."""
        # Casts are not kept from one forward to the next: a captured graph would replay without them.
        return torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        # Plans are of these very modules, not of a copy's.
        return {**self.__dict__, "_plans": {}}

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

    def features(self, x: Tensor) -> Tensor:
        """What the adapted module sees of the examples, (tasks, n, ...)."""
        return x

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
        parameters, theta = self._start(batch.support.y)
        outer = torch.is_grad_enabled()
        with self._named_errors(batch, parameters[0]):
            # Groups of about the same size.
            groups = -(-tasks // self._at_once(theta, batch))
            parts = [self._group(theta, group, parameters, outer) for group in batch.split(-(-tasks // groups))]
        support_losses, losses = (torch.cat([part[i] for part in parts], -1) for i in range(2))
        accuracies = [part[2] for part in parts]
        with torch.set_grad_enabled(outer):
            loss = losses.mean()
        missing = any(accuracy is None for accuracy in accuracies)
        return MetaResult(loss, support_losses, losses.detach(), None if missing else torch.cat(accuracies))

    def _start(self, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """The parameters that are adapted, and packed, (1, n); raises what `forward` raises of the learner itself."""
        with exclusive():
            check_modules(self.model)
            parameters = check_structure(self.adapted, self.packing)
        if self.bf16 and parameters[0].dtype != torch.float32:
            raise ValueError(
                f"bf16: expected parameters of torch.float32, which autocast rounds, got {parameters[0].dtype}"
            )
        if self.loss is None and targets.is_floating_point():
            raise ValueError(
                "loss: expected integer targets for the default cross-entropy, got "
                f"{targets.dtype}; pass a loss, such as mse_loss, or cross_entropy for probabilities"
            )
        if self.update is not None:
            check_alike(self.update, parameters[0])
        with torch.enable_grad():
            return parameters, self.packing.pack(parameters)

    @contextmanager
    def _named_errors(self, batch: TaskBatch, like: Tensor) -> Iterator[None]:
        """Says what of a batch does not fit where torch's own error does not."""
        try:
            yield
        except Unserved as reason:
            raise RuntimeError(f"route: {reason}; route='loop' serves it") from None
        except (RuntimeError, TypeError, ValueError) as error:
            if reason := foreign_tensor(batch, like):
                raise TypeError(reason) from error
            raise

    @_eager
    def adapt(self, support: Examples | tuple[Tensor, Tensor], steps: int | None = None) -> Adapted:
        """The model adapted to the support examples of one task, or of several.

        Args:
            support: (x, y) of one task, x (n, ...) and y (n, ...); or Examples of several, (tasks, n, ...) each.
            steps: inner steps, as many as in training by default; 0 for the model as it is.

        Returns:
            What predicts and holds the adapted parameters; differentiable unless under torch.no_grad().

        Raises:
            As `forward`.
        """
        single = not isinstance(support, Examples)
        if single:
            if not isinstance(support, tuple) or not all(isinstance(X, Tensor) for X in support) or len(support) != 2:
                raise TypeError(
                    f"support: expected (x, y) of one task or Examples(x, y) of several, got {type(support).__name__}"
                )
            support = Examples(*(X[None] for X in support))
        steps, outer = self.steps if steps is None else check_steps(steps, 0), torch.is_grad_enabled()
        batch = TaskBatch(support, support)
        check_batch(batch)
        parameters, theta = self._start(support.y)
        with self._named_errors(batch, parameters[0]):
            x = self.features(support.x)
            route = self._choose(self._part, self.adapted, self.packing, theta, x)
            rows, losses = self._adapt(route, theta, Examples(x, support.y), outer, steps)
            route.finish(theta, parameters)
        return Adapted(self, rows if outer else rows.detach(), losses, single)

    def predict(self, theta: Tensor, x: Tensor) -> Any:
        """The model's outputs with packed parameters of each task.

        Args:
            theta: (tasks, n), packed.
            x: (tasks, examples, ...).

        Returns:
            (tasks, examples, ...), or one output per task where that is no tensor.
        """
        examples = Examples(x, x)
        with self._named_errors(TaskBatch(examples, examples), theta):
            x = self.features(x)
            route = self._choose(self._part, self.adapted, self.packing, theta, x)
            outputs = self._outputs(route, route.leaves(theta), x, torch.is_grad_enabled())
        if not isinstance(outputs, Tensor) and all(isinstance(output, Tensor) for output in outputs):
            return torch.stack(outputs)
        return outputs

    def _group(
        self, theta: Tensor, batch: TaskBatch, parameters: list[Tensor], outer: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Support losses (steps, tasks), query losses (tasks,) and accuracies (tasks,) of tasks in one graph."""
        support_x, query_x = self.inputs(batch)
        route, start = self._choose(self._part, self.adapted, self.packing, theta, support_x), theta
        theta, support_losses = self._adapt(route, theta, Examples(support_x, batch.support.y), outer, self.steps)
        with torch.set_grad_enabled(outer):
            # Other numbers of examples may be computed otherwise.
            last = self._choose(self._part, self.adapted, self.packing, start, query_x)
            outputs, losses = self._losses(last, last.leaves(theta), Examples(query_x, batch.query.y), outer)
        route.finish(start, parameters)
        return support_losses, losses, task_accuracies(outputs, batch.query.y, ignored_target(self.loss))

    def _adapt(self, route: Route, theta: Tensor, support: Examples, outer: bool, steps: int) -> tuple[Tensor, Tensor]:
        """theta (tasks, n) after the inner loop, and the support losses (steps, tasks)."""
        loop = InnerLoop(
            route,
            lambda leaves: self._losses(route, leaves, support, outer)[1],
            self.update,
            self.lr,
            self.adapt_update,
            self.first_order,
            self.allow_unused,
            outer,
            self if self.checkpoint else None,
        )
        with torch.enable_grad():
            phi = self.update.phi if self.update is not None else ()
            return loop.run(theta.expand(len(support.x), -1), phi, steps)

    def _losses(
        self, route: Route, leaves: Sequence[Tensor], examples: Examples, outer: bool
    ) -> tuple[Tensor | list[Any], Tensor]:
        """The outputs of the tasks, and their losses (tasks,)."""
        outputs = self._outputs(route, leaves, examples.x, outer)
        loss = F.cross_entropy if self.loss is None else self.loss
        return outputs, task_losses(loss, outputs, examples.y)

    def _outputs(self, route: Route, leaves: Sequence[Tensor], x: Tensor, outer: bool) -> Tensor | list[Any]:
        with exclusive(differentiable=outer and not self.first_order), self._precision(x):
            outputs = route.outputs(leaves, x)
        return tree_map_only(Tensor, _as_float, outputs) if self.bf16 else outputs


def _as_float(X: Tensor) -> Tensor:
    return X.float() if X.is_floating_point() else X
