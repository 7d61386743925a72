"""MAML with learned updates: adapts a model to all tasks of a meta-batch, and computes its losses and metrics."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.updates import GradientDescent, Update, state
from kfo_ext.updates.checks import check_adapted, check_fits, check_rate

from .adapted import Adapted
from .calls import exclusive
from .checks import (
    check_alike,
    check_batch,
    check_examples,
    check_function,
    check_modules,
    check_steps,
    check_update,
)
from .inner_loop import InnerLoop
from .losses import CLASSES, Loss, ignored_target, task_losses
from .metric import Metric, task_accuracies, task_metrics
from .named_errors import named, named_errors
from .plans import Plans, precision
from .result import MetaResult
from .routes import ROUTES, Route, TaskByTask, tasks_at_once
from .selection import Selection, adapted_by_default, named_under

P = ParamSpec("P")
R = TypeVar("R")


def _eager(forward: Callable[P, R]) -> Callable[P, R]:
    """The forward, excluded from torch.compile: a compiled region has no second derivative."""

    @functools.wraps(forward)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Only a process that compiles has loaded dynamo.
        return (torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward)(*args, **kwargs)

    return run


class MAML(nn.Module):
    """Model-agnostic meta-learning of a model and, with `update`, of the update rule it adapts by.

    Args:
        model: any module whose forward takes one tensor of examples; batch norm must use batch statistics.
        adapted: what the inner loop adapts, by names of the model's parameters or shell patterns such as "head.*". None
            selects what a property `adapted` of the model's class, or of a module's in it, lists, as a TNet's does;
            without one, all parameters. They must require a gradient, or see `allow_nograd`. The other parameters are
            only meta-learned.
        update: an `Update` made for the adapted parameters, such as a KFO, or None for plain gradient descent.
        lr: the inner learning rate.
        steps: inner steps.
        adapt_update: adapt the update's meta-parameters per task as well, from the second step on.
        first_order: treat the model's gradients as constants (FOMAML).
        loss: of (output, target), the mean over one task's examples; None is torch's cross-entropy, for integer labels.
        metric: of (output, target), a number for one task, from its query examples; None is the accuracy where outputs
            are logits with the classes in dimension 1 and targets are classes.
        checkpoint: recompute each inner step in the outer backward pass, so that memory does not grow with their
            number. Random numbers and buffers are those of the first computation. Each gradient inside a step
            recomputes the step up to there and evaluates the update again; without checkpoint it is evaluated once.
        allow_unused: leave parameters unchanged that a task's loss does not depend on, instead of raising.
        allow_nograd: leave parameters unchanged that do not require a gradient, instead of raising.
        route: how all tasks are computed: "vmap", in one forward, usually several times as fast, for networks whose
            functions are all in `kfo_ext.adapt.verified`; "loop", one after the other; "auto", by vmap if it serves
            the network. The property `route` holds the choice and its reason.
        bf16: run the model's forward and its derivatives under torch.autocast in bfloat16; parameters, gradients,
            updates, features for a head and losses stay in float32.

    Several threads may call one learner; on the route "loop" their forwards take turns. Meanwhile read the model's
    parameters through the learner, since the model may hold those of a task. torch.compile runs a learner eagerly.

    Raises:
        ValueError: a number is out of range, a pattern fits no parameter, a parameter is frozen without its flag, the
            update was made for other parameters than the adapted ones, or there is `adapt_update` without an update.
        TypeError: an argument has another type, or parameters have several dtypes.

    Source:
        paper, equations 1 and 22, Algorithm 1 (with the lr that its line 8 misses).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapted: Sequence[str] | None = None,
        update: Update | None = None,
        lr: float,
        steps: int,
        adapt_update: bool = False,
        first_order: bool = False,
        loss: Loss | None = None,
        metric: Metric | None = None,
        checkpoint: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        route: str = "auto",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if route not in ROUTES:
            raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
        self.lr = lr
        self.steps = check_steps(steps)
        self.model = model
        self.adapt_update = adapt_update
        self.first_order = first_order
        self.loss = loss
        self.metric = metric
        self.checkpoint = checkpoint
        self.allow_unused = allow_unused
        self.bf16 = bf16
        self._plans = Plans(route, bf16)
        self._selection = Selection(adapted_by_default(model) if adapted is None else adapted)
        self._selection.check(model)
        self.packing = self._selection.packing(named_under(model, self.part), allow_nograd)
        self.update = cast(Update, update)
        check_adapted(adapt_update, self.update)

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module's, for values that the constructor would take."""
        super().__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """The value to store as attribute `name`; raises what the constructor raises."""
        if name in ("loss", "metric"):
            check_function(name, value)
        elif name == "lr":
            return check_rate(value)
        elif name == "steps":
            # 0 steps serve an evaluation.
            return check_steps(value, 0)
        elif name == "model" and not isinstance(value, nn.Module):
            raise TypeError(f"model: expected a module, got {value!r}")
        elif name == "update":
            value = GradientDescent(self.packing) if value is None else value
            if not isinstance(value, Update):
                got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
                raise TypeError(
                    f"update: expected an Update, such as KFO(model.named_parameters()), or None, got {got}"
                )
            check_update(value, self.packing)
        return value

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of the parameters that the inner loop adapts, in the packing's order."""
        return self.packing.names

    # The name of the adapted part in `route`.
    _label = "model"

    @property
    def part(self) -> str:
        """The name of the module that the inner loop calls, "" for the model itself."""
        return ""

    @property
    def called(self) -> nn.Module:
        """The module that the inner loop calls."""
        return self.model.get_submodule(self.part)

    def current(self) -> list[Tensor]:
        """The model's present adapted parameters; raises ValueError if they changed after the learner was built."""
        with exclusive():
            return self._selection.current(named_under(self.model, self.part), self.packing)

    @property
    def route(self) -> str:
        """How the last call computed all tasks: "vmap", or "loop" with the reason; before any call, the option."""
        return self._plans.route

    def _choose(self, parameters: Sequence[Tensor], theta: Tensor, x: Tensor) -> Route:
        """The route of the module that the inner loop calls."""
        return self._plans.choose(self._label, self.called, self.packing, parameters, theta, x)

    def _at_once(self, parameters: Sequence[Tensor], theta: Tensor, batch: TaskBatch) -> int:
        """The number of tasks of a batch to compute in one graph."""
        route = self._choose(parameters, theta, batch.support.x)
        return tasks_at_once(route, batch.support.x, max(part.x.shape[1] for part in batch), self._row(theta))

    def _row(self, theta: Tensor) -> int:
        """Bytes of the longest packed row that each task has of its own."""
        own = (theta, *self.update.phi) if self.adapt_update else (theta,)
        return max(row.shape[-1] * row.element_size() for row in own)

    # Another thread may have substituted a task's parameters for the model's own.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, safe while other threads call the learner; so are `parameters` and `state_dict`."""
        with exclusive():
            return iter(list(super().named_parameters(*args, **kwargs)))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        with exclusive():
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        with exclusive(), state.explained():
            return super().load_state_dict(*args, **kwargs)

    def features(self, x: Tensor) -> Tensor:
        """The adapted module's inputs for examples (tasks, n, ...)."""
        return x

    def inputs(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The adapted module's inputs for support and query examples, (tasks, n, ...) each."""
        return batch.support.x, batch.query.x

    if TYPE_CHECKING:

        def __call__(self, batch: TaskBatch, steps: int | None = None) -> MetaResult:
            """As `forward`."""

    @_eager
    def forward(self, batch: TaskBatch, steps: int | None = None) -> MetaResult:
        """Adapt to every task's support examples, and compute losses and metrics of its query examples.

        Under torch.no_grad() it evaluates: the inner loop still differentiates, but its graph is freed.

        Args:
            batch: support.x (tasks, n, ...), support.y (tasks, n, ...), the same for query.
            steps: inner steps, as many as the learner was built with by default; 0 evaluates the model unadapted.

        Returns:
            The mean query loss, to call backward on, with the losses and metrics of each task.

        Raises:
            ValueError: there is no task or example, support and query hold different numbers of tasks, bf16 is set
                without float32, the model's parameters changed, or the default loss does not fit the targets.
            TypeError: the batch is no TaskBatch of dense tensors that the model accepts, or a metric is no number.
            RuntimeError: in inference mode, if a normalisation would use running statistics, or if the metric raised.
        """
        tasks, steps = check_batch(batch), self._steps(steps)
        parameters, theta = self._start(batch.support.y)
        outer = torch.is_grad_enabled()
        with named_errors(named("batch", batch), theta):
            # Groups of about the same size.
            groups = -(-tasks // self._at_once(parameters, theta, batch))
        parts = [self._group(theta, group, parameters, outer, steps) for group in batch.split(-(-tasks // groups))]
        support_losses, losses = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        metrics = [part[2] for part in parts if part[2] is not None]
        with torch.set_grad_enabled(outer):
            loss = losses.mean()
        return MetaResult(
            loss, support_losses, losses.detach(), torch.cat(metrics) if len(metrics) == len(parts) else None
        )

    def _steps(self, steps: int | None) -> int:
        return self.steps if steps is None else check_steps(steps, 0)

    def _start(self, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """The adapted parameters, and their packed row (1, n); checks the learner and the targets' dtype."""
        with exclusive():
            check_modules(self.model)
            parameters = self.current()
        if self.bf16 and parameters[0].dtype != torch.float32:
            raise ValueError(
                f"bf16: expected parameters of torch.float32, which autocast rounds, got {parameters[0].dtype}"
            )
        if self.loss is None and targets.dtype not in CLASSES:
            floating = "pass a loss, such as mse_loss, or cross_entropy for probabilities"
            raise ValueError(
                "loss: expected integer targets for the default cross-entropy, of torch.int64, got "
                f"{targets.dtype}; {floating if targets.is_floating_point() else 'y.long() converts them'}"
            )
        check_adapted(self.adapt_update, self.update)
        check_alike(self.update, parameters[0])
        check_fits(self.lr, parameters[0].dtype)
        with torch.enable_grad():
            return parameters, self.packing.pack(parameters, "parameters")

    @_eager
    def adapt(self, support: Examples | tuple[Tensor, Tensor], steps: int | None = None) -> Adapted:
        """Adapt the model to the support examples of one task or of several.

        Args:
            support: (x, y) of one task, x (n, ...) and y (n, ...); or Examples of several, (tasks, n, ...) each.
            steps: inner steps, as many as in training by default; 0 leaves the model unadapted.

        Returns:
            The adapted model; differentiable unless under torch.no_grad().

        Raises:
            TypeError: `support` is neither; otherwise errors are those of `forward`.
        """
        single = not isinstance(support, Examples)
        if single:
            if not isinstance(support, tuple) or len(support) != 2:
                raise TypeError(
                    f"support: expected (x, y) of one task or Examples(x, y) of several, got {type(support).__name__}"
                )
            for field, given in zip(Examples._fields, support):
                if not isinstance(given, Tensor):
                    got = f"{type(given).__name__}; torch.as_tensor converts an array"
                    raise TypeError(f"support.{field}: expected a tensor, got {got}")
            support = support[0][None], support[1][None]
        examples = Examples(*support)
        steps, outer = self._steps(steps), torch.is_grad_enabled()
        check_examples("support", examples)
        parameters, theta = self._start(examples.y)
        with named_errors(named("support", examples), theta):
            x = self.features(examples.x)
            route = self._choose(parameters, theta, x)
            rows, losses = self._adapt(route, theta, Examples(x, examples.y), outer, steps)
            route.finish(theta, parameters)
        return Adapted(self, rows if outer else rows.detach(), losses, single)

    def predict(self, theta: Tensor, x: Tensor) -> Any:
        """The model's outputs with packed parameters of each task.

        Args:
            theta: (tasks, n), packed.
            x: (tasks, examples, ...).

        Returns:
            (tasks, examples, ...), or one output per task if outputs are no tensors.

        Raises:
            ValueError: the model's parameters changed after the learner was built.
            RuntimeError: a normalisation would use running statistics.
        """
        with exclusive():
            check_modules(self.model)
            parameters = self.current()
        with named_errors({"x": x}, theta):
            x = self.features(x)
            route = self._choose(parameters, theta, x)
            outputs = self._outputs(route, route.leaves(theta), x, torch.is_grad_enabled())
        if not isinstance(outputs, Tensor) and all(isinstance(output, Tensor) for output in outputs):
            return torch.stack(outputs)
        return outputs

    def _group(
        self, theta: Tensor, batch: TaskBatch, parameters: list[Tensor], outer: bool, steps: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Support losses (steps, tasks), query losses (tasks,) and metrics (tasks,) of tasks in one graph."""
        with named_errors(named("batch", batch), theta):
            support_x, query_x = self.inputs(batch)
            route, start = self._choose(parameters, theta, support_x), theta
            theta, support_losses = self._adapt(route, theta, Examples(support_x, batch.support.y), outer, steps)
            with torch.set_grad_enabled(outer):
                # Another number of examples may take another route.
                last = self._choose(parameters, start, query_x)
                outputs, losses = self._losses(last, last.leaves(theta), Examples(query_x, batch.query.y), outer)
            route.finish(start, parameters)
        if self.metric is None:
            return support_losses, losses, task_accuracies(outputs, batch.query.y, ignored_target(self.loss))
        return support_losses, losses, task_metrics(self.metric, outputs, batch.query.y, losses)

    def _adapt(self, route: Route, theta: Tensor, support: Examples, outer: bool, steps: int) -> tuple[Tensor, Tensor]:
        """The adapted theta (tasks, n), and the support losses (steps, tasks)."""
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
            return loop.run(theta.expand(len(support.x), -1), self.update.phi, steps)

    def _losses(
        self, route: Route, leaves: Sequence[Tensor], examples: Examples, outer: bool
    ) -> tuple[Tensor | list[Any], Tensor]:
        """The outputs of the tasks, and their losses (tasks,)."""
        outputs = self._outputs(route, leaves, examples.x, outer)
        loss = F.cross_entropy if self.loss is None else self.loss
        return outputs, task_losses(loss, outputs, examples.y)

    def _outputs(self, route: Route, leaves: Sequence[Tensor], x: Tensor, outer: bool) -> Tensor | list[Any]:
        # By vmap, attention is composed of functions with a second derivative.
        by_torch = isinstance(route, TaskByTask)
        with exclusive(differentiable=by_torch and outer and not self.first_order), precision(x, self.bf16):
            outputs = route.outputs(leaves, x)
        return tree_map_only(Tensor, _as_float, outputs) if self.bf16 else outputs


def _as_float(X: Tensor) -> Tensor:
    return X.float() if X.is_floating_point() else X
