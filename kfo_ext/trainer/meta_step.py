"""One meta-iteration as a unit: adaptation, meta-gradients, clipping, outer step; it never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kfo_ext.adapt import MAML, MetaResult
from kfo_ext.adapt.result import REMEDY
from kfo_ext.tasks import TaskBatch

from .ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MetaReport(NamedTuple):
    """The result of one meta-iteration, on its device until `on_host`; tasks are in the order of the meta-batches.

    Attributes:
        loss: (), the mean query loss.
        support_losses: (steps, tasks), before each inner step.
        query_losses: (tasks,).
        gradient_norm: (), of the meta-gradients of the optimizer's parameters, before clipping.
        metric: (), the mean query metric, accuracy by default, or None if there is no metric.
    """

    loss: Tensor
    support_losses: Tensor
    query_losses: Tensor
    gradient_norm: Tensor
    metric: Tensor | None

    def on_host(self) -> MetaReport:
        """The same on the CPU, by one transfer, which waits for the device; in the widest of their types."""
        present = [value for value in self if value is not None]
        packed = torch.cat([value.reshape(-1) for value in present]).cpu()
        pieces = packed.split([value.numel() for value in present])
        values = [piece.view(value.shape) for piece, value in zip(pieces, present)]
        return MetaReport(*values, *[None] * (len(self) - len(values)))


def outer_rate(lr: float, device: torch.device) -> float | Tensor:
    """The rate of a parameter group; on CUDA a float32 tensor, which fused kernels read and a CUDA graph follows."""
    return torch.tensor(lr, dtype=torch.float32, device=device) if device.type == "cuda" else lr


def make_adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    """The outer Adam(0.9, 0.999), fused, so that a flag on the device can skip a step."""
    parameters = list(parameters)
    rate = outer_rate(lr, parameters[0].device)
    return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.999), fused=True)


class MetaStep:
    """One whole meta-iteration of a learner and its optimizer: nothing is read back, nothing depends on a value.

    If a loss or the norm of the meta-gradient is not finite, parameters and the optimizer's state stay bitwise
    unchanged, and `check_finite` names the value.

    Clearing, differentiating, measuring and clipping apply only to the optimizer's parameters: `grad` of the others
    stays unchanged. The groups keep the ratios of their rates, given by their `initial_lr`: the rate that a group has
    when it is first seen here (or by one of torch's schedulers), saved with the optimizer's state.

    Args:
        learner: MAML or ANIL.
        optimizer: Adam, AdamW or SGD, fused, of all or some of the learner's parameters, in one group or several.
        clip_norm: longer meta-gradients are scaled to this norm, before any weight decay; 0 is no limit.
        group: the ranks that take this step together, which begin with equal parameters. Each calls it with the same
            whole meta-batches, computes its part of their tasks, and gets the report of all tasks; one all-reduce sums
            the meta-gradients. Random numbers of a forward come from each rank's own generator.

    Raises:
        ValueError: the limit is negative, the optimizer is of another kind or not fused, or a parameter is not the
            learner's.
    """

    def __init__(
        self,
        learner: MAML,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = 0.0,
        group: ProcessGroup | None = None,
    ) -> None:
        if not clip_norm >= 0:
            raise ValueError(f"clip_norm: expected at least 0, got {clip_norm}")
        # AdamW is an Adam.
        known = isinstance(optimizer, torch.optim.Adam | torch.optim.SGD)
        if not known or not all(group["fused"] for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: expected Adam, AdamW or SGD with fused=True, which can leave out a step on the device, "
                f"got {type(optimizer).__name__}{' with fused=False' if known else ''}"
            )
        self.learner = learner
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self._ranks = Ranks(group)
        self._parameters()
        self._ratios()

    def __call__(self, batch: TaskBatch | Sequence[TaskBatch], rate: float) -> MetaReport:
        """Take one meta-step; the meta-gradients stay in `grad`, clipped.

        Args:
            batch: on the learner's device, in its type. Several are adapted one after another, in the memory of one,
                and give the meta-gradients of all their tasks together.
            rate: the learning rate of the group with the largest `initial_lr`; another group's rate is this times their
                ratio, so that groups of one rate keep one rate, and a group of rate 0 beside others stays unchanged.

        Returns:
            The report, on the device.

        Raises:
            ValueError: there is no batch, the rate is negative or not finite, or the optimizer has no parameter to
                step; with a group, there are fewer tasks than ranks, or the forward changes a buffer (such as running
                statistics), which would then differ between ranks.
            LostRank: another rank has ended.
        """
        batches = several(batch)
        self._set_rate(rate)
        return self._iterate(batches)

    def check_finite(self, report: MetaReport) -> None:
        """Check that the last meta-step was finite.

        Args:
            report: of the last call, on the CPU.

        Raises:
            FloatingPointError: a value is not finite; the message names the first step and task, or the parameter.
        """
        MetaResult(report.loss, report.support_losses, report.query_losses, None).check_finite()
        if report.gradient_norm.isfinite():
            return
        ours = set(self._parameters())
        for name, parameter in self.learner.named_parameters():
            if parameter in ours and parameter.grad is not None and not parameter.grad.isfinite().all():
                raise FloatingPointError(f"the meta-gradient of {name} is not finite: {REMEDY}")
        raise FloatingPointError(f"the norm of the meta-gradient is not finite: {REMEDY}")

    def _parameters(self) -> list[Tensor]:
        """The optimizer's parameters, each once.

        Returns:
            The parameters, in the order of the groups.

        Raises:
            ValueError: a parameter is not the learner's; the message names the first one.
        """
        # Read in every call: a group may have been added since.
        own = set(self.learner.parameters())
        for number, group in enumerate(self.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter not in own:
                    names = group.get("param_names")
                    name = names[index] if names else f"parameter {index}"
                    where = "" if names else f" of group {number}"
                    raise ValueError(
                        f"optimizer: expected parameters of the learner, got {name} {tuple(parameter.shape)}{where}: "
                        "build the optimizer of its own parameters"
                    )
        return list(dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"]))

    def _ratios(self) -> list[float]:
        """The ratio of each group's rate to the largest."""
        groups = self.optimizer.param_groups
        for group in groups:
            # A number, which a checkpoint can hold and which later calls need not read from the device.
            if not isinstance(group.get("initial_lr"), float):
                group["initial_lr"] = float(group.get("initial_lr", group["lr"]))
        rates = [group["initial_lr"] for group in groups]
        # Equal rates have the ratio 1, even if all are 0.
        return [1.0 if rate == max(rates) else rate / max(rates) for rate in rates]

    def _set_rate(self, rate: float) -> None:
        if not 0 <= rate < math.inf:
            raise ValueError(f"rate: expected a finite number of at least 0, got {rate}")
        for group, ratio in zip(self.optimizer.param_groups, self._ratios()):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio

    def _begin_momentum(self) -> None:
        """Set SGD's initial momentum to zero: torch leaves it undefined if the first step is skipped.

        Raises:
            ValueError: the momentum is damped, since torch does not damp its first step.
        """
        for group in self.optimizer.param_groups:
            if not group.get("momentum"):
                continue
            if group["dampening"]:
                raise ValueError(f"optimizer: expected an SGD with dampening=0, got dampening={group['dampening']}")
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def _iterate(self, batches: Sequence[TaskBatch]) -> MetaReport:
        learned = [p for p in self._parameters() if p.requires_grad]
        if not learned:
            raise ValueError("optimizer: expected a parameter that requires a gradient, got only frozen ones")
        self._begin_momentum()
        self.optimizer.zero_grad()
        results = []
        buffers: dict[str, Tensor] = {}
        if self._ranks.size > 1:
            buffers = {name: X.clone() for name, X in self.learner.named_buffers()}
        for batch, share in zip(batches, _shares(batches)):
            own, part = self._ranks.own(batch)
            result = self.learner(own)
            shared = result.loss * (share * part)
            shared.backward(inputs=learned)
            results.append(result._replace(loss=shared.detach()))
        loss = torch.stack([result.loss for result in results]).sum()
        losses = torch.cat([torch.cat([result.support_losses, result.query_losses[None]]) for result in results], 1)
        present = [result.metrics for result in results if result.metrics is not None]
        metrics = torch.cat(present) if present else None
        metric = None if metrics is None else metrics.mean()
        if self._ranks.size > 1:
            _check_buffers(self.learner, buffers)
            loss, losses, metric = self._over_ranks(learned, batches, loss, losses, metrics)
        norm = get_total_norm([p.grad for p in learned if p.grad is not None])
        if self.clip_norm:
            # A norm that is not finite would spread to every gradient, and hide its origin.
            clip_grads_with_norm_(learned, self.clip_norm, norm.nan_to_num(posinf=0.0))
        finite = losses.isfinite().all() & norm.isfinite()
        # As in torch's GradScaler: the optimizer, including its step counter, skips the step if this is 1.
        # Not an attribute that the class declares.
        setattr(self.optimizer, "found_inf", finite.logical_not().float())  # noqa: B010
        try:
            self.optimizer.step()
        finally:
            delattr(self.optimizer, "found_inf")
        return MetaReport(loss, losses[:-1], losses[-1], norm, metric)

    def _over_ranks(
        self,
        learned: Sequence[Tensor],
        batches: Sequence[TaskBatch],
        loss: Tensor,
        losses: Tensor,
        metrics: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum the meta-gradients in `grad` over the ranks.

        Args:
            learned: the parameters that require a gradient.
            batches: the whole meta-batches.
            loss: this rank's part of it.
            losses: (steps + 1, own tasks).
            metrics: (own tasks,), or None.

        Returns:
            Loss, losses and metric of all tasks.
        """
        counts = [len(batch.support.x) for batch in batches]
        # Each rank fills the columns of its own tasks: the sum concatenates them.
        columns = losses.new_zeros(len(losses), sum(counts))
        begin = done = 0
        for count in counts:
            part = self._ranks.part(count)
            own = part.stop - part.start
            columns[:, begin + part.start : begin + part.stop] = losses[:, done : done + own]
            begin, done = begin + count, done + own
        missing = [p.grad is None for p in learned]
        given = torch.tensor(missing, device=loss.device).logical_not().float()
        scores = loss.new_zeros(1) if metrics is None else metrics
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        scored = torch.tensor(float(len(scores)), device=loss.device)
        loss, losses, score, scored, given, *gradients = self._ranks.sums(
            [loss, columns, scores.sum(), scored, given, *gradients]
        )
        # Read from the device only if a gradient is missing here: a parameter without one on all ranks keeps None.
        anywhere = [number > 0 for number in given.tolist()] if any(missing) else [True] * len(learned)
        for parameter, gradient, known in zip(learned, gradients, anywhere, strict=True):
            parameter.grad = gradient if known else None
        return loss, losses, None if metrics is None else score / scored


def several(batch: TaskBatch | Sequence[TaskBatch]) -> Sequence[TaskBatch]:
    """The meta-batches of one iteration, as a sequence.

    Args:
        batch: one meta-batch or several.

    Returns:
        At least one meta-batch.

    Raises:
        ValueError: there is none.
    """
    batches = [batch] if isinstance(batch, TaskBatch) else batch
    if not batches:
        raise ValueError("batch: expected at least one meta-batch, got none")
    return batches


def _shares(batches: Sequence[TaskBatch]) -> list[float]:
    """The share of each batch in all tasks."""
    counts = [len(batch.support.x) for batch in batches]
    if len(batches) == 1 or not any(counts):
        return [1.0 / len(batches)] * len(batches)
    return [count / sum(counts) for count in counts]


def _check_buffers(module: torch.nn.Module, before: dict[str, Tensor]) -> None:
    """Raise ValueError naming the first buffer that has changed."""
    # Compared by value: torch does not count up the version of running statistics that it writes.
    for name, X in module.named_buffers():
        if name not in before or not torch.equal(X, before[name]):
            raise ValueError(
                f"group: the forward changes the buffer {name!r}, and each rank would have another: build the module "
                "without it (track_running_stats=False for a batch norm), or train with one process"
            )
