"""MAML and ANIL with learned updates: the inner loop of a whole meta-batch, differentiable end to end.

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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as checkpointed

from kfo_ext.models import TasksForward, tasks_at_once, tasks_features, tasks_forward
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.transform.packing import Packing
from kfo_ext.updates import KFO


class MetaResult(NamedTuple):
    """What one meta-batch gives.

    loss: (), the mean query loss over tasks after the last step; its backward gives the meta-gradients.
    support_losses: (steps, tasks), before each step, detached.
    query_losses: (tasks,), detached.
    accuracies: (tasks,), the query accuracy of each task, or None for regression.
    """

    loss: Tensor
    support_losses: Tensor
    query_losses: Tensor
    accuracies: Tensor | None

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first step and task whose loss is not finite."""
        losses = torch.cat([self.support_losses, self.query_losses[None]])
        bad = (~losses.isfinite()).nonzero()
        if len(bad) == 0:
            return
        step, task = bad[0].tolist()
        where = f"support loss of step {step + 1}" if step < len(losses) - 1 else "query loss"
        raise FloatingPointError(f"the {where} of task {task} is {losses[step, task].item()}")


class MAML(nn.Module):
    """Model-agnostic meta-learning of a model and, with `update`, of the update rule it adapts by.

    Args:
        model: any module whose forward takes one tensor of examples; batch norm must use batch statistics.
        update: a KFO made for the adapted parameters, or None for plain gradient descent.
        lr: the inner learning rate.
        steps: inner steps.
        adapt_update: adapt the update's meta-parameters per task as well, from the second step on.
        first_order: treat the model's gradients as constants (FOMAML).
        loss: of (output, target), the mean over one task's examples.
        checkpoint: recompute each inner step in the outer backward pass: memory does not grow with their number.
        allow_unused: parameters that a task's loss does not depend on stay as they are.
        allow_nograd: parameters that do not require a gradient stay as they are.
        batched: compute all tasks in one forward, which `kfo_ext.models` has for its CNN and for a linear head (several
            times as fast); False: one task after the other by the model's own forward; None: batched where possible.
        bf16: run the model's forward under torch.autocast in bfloat16, and so its derivatives; parameters, gradients,
            updates, features for a head and losses stay in float32.

    Raises:
        ValueError: a number out of range, a frozen parameter without its flag, an update made for other parameters,
            `adapt_update` without an update, `batched` for a model that cannot.
        TypeError: an update that is no KFO.

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
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        checkpoint: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        batched: bool | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if update is not None and not isinstance(update, KFO):
            raise TypeError(f"update: expected a KFO or None, got {type(update).__name__}")
        if not lr >= 0 or lr == float("inf"):
            raise ValueError(f"lr: expected a finite number of at least 0, got {lr!r}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")
        if adapt_update and update is None:
            raise ValueError("adapt_update: expected an update to adapt, got update=None")
        self.model = model
        self.update = update
        self.lr = float(lr)
        self.steps = steps
        self.adapt_update = adapt_update
        self.first_order = first_order
        self.loss = loss
        self.checkpoint = checkpoint
        self.allow_unused = allow_unused
        self.batched = batched
        self.bf16 = bf16
        self.packing = self._adapted_packing(allow_nograd)
        if batched and self._tasks_forward() is None:
            raise ValueError(f"batched: {type(model).__name__} has no forward of all tasks at once that does the same")
        if update is not None:
            _check_update(update, self.packing)

    @property
    def adapted(self) -> nn.Module:
        """The module whose parameters the inner loop adapts."""
        return self.model

    def _adapted_packing(self, allow_nograd: bool) -> Packing:
        named = list(self.adapted.named_parameters())
        if not allow_nograd:
            for name, parameter in named:
                if not parameter.requires_grad:
                    raise ValueError(
                        f"parameter {name!r} does not require a gradient; allow_nograd=True leaves it as it is"
                    )
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not named:
            raise ValueError("model: expected at least one parameter that requires a gradient, got none")
        return Packing.of(named)

    def _tasks_forward(self) -> TasksForward | None:
        """The adapted module's forward of all tasks at once, None to go task by task."""
        # Asked in every call: a hook may have come since.
        whole = len(self.packing) == len(list(self.adapted.parameters()))
        return tasks_forward(self.adapted) if self.batched is not False and whole else None

    def _precision(self, x: Tensor) -> AbstractContextManager:
        """What the model's forward of x runs under."""
        # Casts are not kept from one forward to the next: a captured graph would replay without them.
        return torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if self.bf16 else nullcontext()

    def _examples(self, batch: TaskBatch) -> int:
        """How many examples of a task the largest forward of the model takes."""
        return max(part.x.shape[1] for part in batch)

    def inputs(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """What the adapted module sees of the support and query examples, (tasks, n, ...) each."""
        return batch.support.x, batch.query.x

    def forward(self, batch: TaskBatch) -> MetaResult:
        """Adapts to every task's support examples and measures its query examples.

        Under torch.no_grad() it evaluates: the inner loop still differentiates, but nothing of its graph is kept.

        Args:
            batch: support.x (tasks, n, ...), support.y (tasks, n, ...), the same for query.

        Raises:
            ValueError: no task, support and query of different numbers of tasks, or bf16 for parameters not of float32.
            RuntimeError: called in inference mode, or a batch norm would use running statistics.
        """
        tasks = _check_batch(batch)
        _check_modules(self.model)
        dtype = next(self.adapted.parameters()).dtype
        if self.bf16 and dtype != torch.float32:
            raise ValueError(f"bf16: expected parameters of torch.float32, which autocast rounds, got {dtype}")
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            parameters = dict(self.adapted.named_parameters())
            for name in self.packing.names:
                if not parameters[name].requires_grad:
                    raise ValueError(f"parameter {name!r} was frozen after the learner was built: build it again")
            theta = self.packing.pack([parameters[name] for name in self.packing.names])
        # Groups of about the same size.
        groups = -(-tasks // tasks_at_once(self.model, batch.support.x, self._examples(batch)))
        parts = [self._group(theta, group, outer) for group in batch.split(-(-tasks // groups))]
        support_losses, losses = (torch.cat([part[i] for part in parts], -1) for i in range(2))
        accuracies = [part[2] for part in parts]
        with torch.set_grad_enabled(outer):
            loss = losses.mean()
        return MetaResult(
            loss, support_losses, losses.detach(), None if accuracies[0] is None else torch.cat(accuracies)
        )

    def _group(self, theta: Tensor, batch: TaskBatch, outer: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Support losses (steps, tasks), query losses (tasks,) and accuracies (tasks,) of tasks in one graph."""
        support_x, query_x = self.inputs(batch)
        with torch.enable_grad():
            phi = self.update.phi if self.update is not None else ()
            support = Examples(support_x, batch.support.y)
            theta, support_losses = self._adapt(theta.expand(len(support_x), -1), phi, support, outer)
        with torch.set_grad_enabled(outer):
            outputs, losses = self._losses(theta, Examples(query_x, batch.query.y))
        return support_losses, losses, _accuracies(outputs, batch.query.y)

    def _adapt(self, theta: Tensor, phi: tuple[Tensor, ...], support: Examples, outer: bool) -> tuple[Tensor, Tensor]:
        # Factors that are frozen are not adapted either, in training as in evaluation.
        learned = [row.requires_grad for row in phi]
        last: tuple[Tensor, Tensor | None] | None = None
        step_losses = []
        for _ in range(self.steps):
            if not outer:
                # Evaluation: cut the graph between steps, so that one step's is all that ever lives.
                theta = theta.detach().requires_grad_()
                phi = tuple(row.detach().requires_grad_(needed) for row, needed in zip(phi, learned))
            if self.checkpoint and outer:
                state = checkpointed(self._step, theta, last, support, outer, *phi, use_reentrant=False)
            else:
                state = self._step(theta, last, support, outer, *phi)
            theta, last, losses, *phi = state
            step_losses.append(losses)
        return theta, torch.stack(step_losses)

    def _step(
        self, theta: Tensor, last: tuple[Tensor, Tensor | None] | None, support: Examples, outer: bool, *phi: Tensor
    ) -> tuple:
        """One inner step of every task: (theta, (G, used), losses, *phi); `last` is (G, used) of the step before."""
        G, losses, used = self._gradients(theta, support, create_graph=outer and not self.first_order)
        U = G
        if self.update is not None:
            if self.adapt_update and last is not None:
                phi = self._adapt_phi(phi, last, G, outer)
            U = self._used_update(phi, G, used)
        return theta - self.lr * U, (G, used), losses, *phi

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
        self, theta: Tensor, support: Examples, *, create_graph: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed gradients (tasks, n) of each task's loss, the losses (tasks,), and a mask where some are unused."""
        if forward := self._tasks_forward():
            _, losses = self._losses_of_all(forward, theta, support)
            (G,) = torch.autograd.grad(losses.sum(), theta, create_graph=create_graph)
            return G, losses.detach(), None
        rows = self.packing.rows(theta)
        _, losses = self._losses_of_rows(rows, support)
        leaves = [piece for row in rows for piece in row]
        grads = torch.autograd.grad(losses.sum(), leaves, create_graph=create_graph, allow_unused=True)
        used = None
        if any(grad is None for grad in grads):
            if not self.allow_unused:
                name = self.packing.names[next(i for i, grad in enumerate(grads) if grad is None) % len(self.packing)]
                raise ValueError(
                    f"parameter {name!r}: the loss does not depend on it; allow_unused=True leaves it as it is"
                )
            used = _flat([torch.full_like(leaf, grad is not None) for leaf, grad in zip(leaves, grads)], len(rows))
            grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]
        return _flat(grads, len(rows)), losses.detach(), used

    def _losses(self, theta: Tensor, examples: Examples) -> tuple[Sequence[Tensor], Tensor]:
        """The outputs of each task, and the losses (tasks,)."""
        if forward := self._tasks_forward():
            return self._losses_of_all(forward, theta, examples)
        return self._losses_of_rows(self.packing.rows(theta), examples)

    def _losses_of_all(self, forward: TasksForward, theta: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        with self._precision(theta):
            outputs = forward(dict(zip(self.packing.names, self.packing.unpack(theta))), examples.x)
        if self.bf16:
            outputs = outputs.float()
        if self.loss is nn.functional.cross_entropy and outputs.dim() == 3 and examples.y.dim() == 2:
            losses = self.loss(outputs.flatten(0, 1), examples.y.flatten(), reduction="none")
            return outputs, losses.view(examples.y.shape).mean(1)
        return outputs, self._stacked(outputs, examples.y)

    def _stacked(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        losses = [self.loss(output, y) for output, y in zip(outputs, targets)]
        if losses[0].dim() != 0:
            raise ValueError(f"loss: expected a scalar per task, got shape {tuple(losses[0].shape)}")
        return torch.stack(losses)

    def _losses_of_rows(self, rows: Sequence[Sequence[Tensor]], examples: Examples) -> tuple[list[Tensor], Tensor]:
        with self._precision(examples.x):
            outputs = [
                functional_call(self.adapted, dict(zip(self.packing.names, row)), (x,))
                for row, x in zip(rows, examples.x)
            ]
        if self.bf16:
            outputs = [output.float() for output in outputs]
        return outputs, self._stacked(outputs, examples.y)


class ANIL(MAML):
    """MAML that adapts the head alone: the body's features are computed once per task and shared by all inner steps.

    The body sees support and query examples in one forward, so its batch statistics are over both, as in the reference.

    Args:
        model: a module with `features(x)` and a linear `head`.
        update: a KFO made for `model.head`'s parameters, or None.
        options: as for `MAML`.

    Raises:
        TypeError: a model without `features` or `head`.
        ValueError: as `MAML`.

    Source: Raghu et al. 2020; paper, appendix B.5.
    """

    def __init__(self, model: nn.Module, **options) -> None:
        if not callable(getattr(model, "features", None)) or not isinstance(getattr(model, "head", None), nn.Module):
            raise TypeError(f"model: expected a module with features(x) and a head, got {type(model).__name__}")
        super().__init__(model, **options)

    @property
    def adapted(self) -> nn.Module:
        """The head."""
        return self.model.head

    def _examples(self, batch: TaskBatch) -> int:
        return sum(part.x.shape[1] for part in batch)

    def inputs(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The features of support and query examples, (tasks, n, features) each."""
        x = torch.cat([batch.support.x, batch.query.x], 1)
        forward = tasks_features(self.model) if self.batched is not False else None
        if forward:
            # By way of a packed row, which gives what the features leave out (a bias before batch norm) gradients of 0.
            packing = Packing.of(self.model.named_parameters())
            row = packing.pack(list(self.model.parameters())).expand(len(x), -1)
            with self._precision(x):
                features = forward(dict(zip(packing.names, packing.unpack(row))), x)
        else:
            with self._precision(x):
                features = torch.stack([self.model.features(each) for each in x])
        if self.bf16:
            features = features.float()
        return features.split([batch.support.x.shape[1], batch.query.x.shape[1]], 1)


def _flat(pieces: Sequence[Tensor], tasks: int) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces]).view(tasks, -1)


def _accuracies(outputs: Sequence[Tensor], targets: Tensor) -> Tensor | None:
    if targets.is_floating_point():
        return None
    with torch.no_grad():
        if isinstance(outputs, Tensor) and outputs.dim() == targets.dim() + 1:
            return (outputs.argmax(-1) == targets).float().flatten(1).mean(1)
        return torch.stack([(output.argmax(-1) == y).float().mean() for output, y in zip(outputs, targets)])


def _check_batch(batch: TaskBatch) -> int:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adaptation differentiates, which inference mode forbids: evaluate under torch.no_grad() instead"
        )
    tensors = {
        "support.x": batch.support.x,
        "support.y": batch.support.y,
        "query.x": batch.query.x,
        "query.y": batch.query.y,
    }
    tasks = batch.support.x.shape[0]
    if tasks < 1:
        raise ValueError("batch: expected at least one task, got none")
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.shape[0] != tasks:
            raise ValueError(f"batch.{name}: expected ({tasks} tasks, examples, ...), got shape {tuple(tensor.shape)}")
    return tasks


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and not module.training:
            raise RuntimeError(
                f"batch norm {name!r} would use running statistics, which mix tasks: "
                "build it with track_running_stats=False"
            )


def _check_update(update: KFO, packing: Packing) -> None:
    theirs = update.problems.packing
    if len(theirs) != len(packing):
        raise ValueError(f"update: expected one made for {len(packing)} parameters, got one for {len(theirs)}")
    for name, shape, other_name, other_shape in zip(packing.names, packing.shapes, theirs.names, theirs.shapes):
        if shape != other_shape or (theirs.named and name != other_name):
            raise ValueError(
                f"update: expected factors for parameter {name!r} of shape {tuple(shape)}, "
                f"got some made for {other_name!r} of shape {tuple(other_shape)}"
            )
