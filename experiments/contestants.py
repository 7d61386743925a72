"""What meta-trains against the clock: our methods by the steps of `kfo train`, learn2learn's by its own loop.

`apart` is the proof that the two of a pair do the same: their first losses and meta-gradients in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from bench.meta_case import NETWORKS, MetaCase, flat
from bench.meta_ours import gradients_of
from bench.meta_task_loops import learn2learn
from kfo_ext.adapt import MAML
from kfo_ext.tasks import TaskBatch, TaskFamily
from kfo_ext.trainer import Config, evaluate
from kfo_ext.trainer.evaluation import Cancelled
from kfo_ext.trainer.meta_step import MetaStep
from kfo_ext.trainer.recipe import build_learner, build_optimizer
from kfo_ext.trainer.schedules import meta_rate
from kfo_ext.updates import KFO

# Options that these loops do not support, with the only value allowed.
OF_OURS = {"accumulate": 1, "precision": "ieee", "cuda_graph": False, "device": "cpu", "meta_lr_update": None}
# The options that learn2learn supports, as its own scripts set them; options absent in a configuration are not checked.
OF_LEARN2LEARN = {
    "network": "omniglot_cnn",
    "method": "maml",
    "first_order": False,
    "psd": True,
    "hidden_layers": 0,
    "bias": False,
    "max_factor": None,
    "per_step": False,
    "adapt_update": True,
    "clip_norm": 0.0,
    "schedule": "constant",
    "meta_lr_warmup": 0,
}
UPDATES = ("none", "kfo")

Stop = Callable[[], bool]


class Contestant(Protocol):
    """A learner with its meta-training."""

    def iterate(self, batch: TaskBatch) -> float:
        """Take one meta-iteration.

        Args:
            batch: the meta-batch.

        Returns:
            The mean query loss.

        Raises:
            FloatingPointError: a loss or a meta-gradient is not finite.
        """
        ...

    def accuracy(self, family: TaskFamily, tasks: int, stop: Stop) -> float:
        """Evaluate on tasks 0 .. tasks - 1.

        Args:
            family: the tasks.
            tasks: number of tasks.
            stop: read between tasks; whether to cancel.

        Returns:
            The mean query accuracy.

        Raises:
            Cancelled: `stop` was true.
        """
        ...


class Ours:
    """The steps of `kfo train`.

    Args:
        config: configuration of the run, including its seed.

    Raises:
        ValueError: these steps do not support an option.
    """

    def __init__(self, config: Config) -> None:
        _check("settings", config, OF_OURS)
        self.config = config
        self.learner = build_learner(config)
        self.step = MetaStep(self.learner, build_optimizer(config, self.learner), clip_norm=config.clip_norm)
        self.done = 0

    def iterate(self, batch: TaskBatch) -> float:
        """See `Contestant`."""
        config = self.config
        rate = meta_rate(config.schedule_row, self.done, config.values)
        report = self.step(batch.to(dtype=config.torch_dtype), rate).on_host()
        self.step.check_finite(report)
        self.done += 1
        return report.loss.item()

    def accuracy(self, family: TaskFamily, tasks: int, stop: Stop) -> float:
        """See `Contestant`."""
        metrics = evaluate(self.learner, family, tasks=tasks, batch=self.config.meta_batch, cancelled=stop).metrics
        assert metrics is not None
        return metrics.mean().item()


class Learn2Learn:
    """learn2learn's MAML, or its GBML with KroneckerTransform, with our initialization and outer optimizer.

    Args:
        config: configuration of the run, including its seed.
        first: a meta-batch of the run.

    Raises:
        ValueError: learn2learn does not support the configuration.
        ImportError: learn2learn is not installed.
    """

    def __init__(self, config: Config, first: TaskBatch) -> None:
        check_peer(config)
        self.config = config
        batch = first.to(dtype=config.torch_dtype)
        self.loop = learn2learn(_case(config, build_learner(config), batch))
        groups = [{"params": list(self.loop.module.parameters()), "lr": config.meta_lr}]
        self.optimizer = config.optimizer_row.make(groups, **config.options_of(config.optimizer_row))

    def iterate(self, batch: TaskBatch) -> float:
        """See `Contestant`."""
        self.loop.batch = batch.to(dtype=self.config.torch_dtype)
        loss = self.loop.run().item()
        if not abs(loss) < float("inf"):
            raise FloatingPointError(f"the loss is {loss}")
        self.optimizer.step()
        return loss

    def accuracy(self, family: TaskFamily, tasks: int, stop: Stop) -> float:
        """See `Contestant`; uses learn2learn's own adaptation."""
        meta: Any = self.loop.module
        right = 0.0
        for index in range(tasks):
            if stop():
                raise Cancelled
            support, query = family.sample(index, 1).to(dtype=self.config.torch_dtype)
            learner = meta.clone()
            for _ in range(self.config.steps):
                learner.adapt(cross_entropy(learner(support.x[0]), support.y[0]))
            with torch.no_grad():
                right += (learner(query.x[0]).argmax(1) == query.y[0]).double().mean().item()
        return right / tasks


def check_peer(config: Config) -> None:
    """Raise ValueError for a configuration that learn2learn does not support."""
    if config.update not in UPDATES:
        raise ValueError(f"peers: expected a method with an update of {', '.join(UPDATES)}, got {config.update!r}")
    _check("peers", config, {**OF_OURS, **OF_LEARN2LEARN})


def apart(config: Config, first: TaskBatch) -> float:
    """Compare learn2learn's first loss and meta-gradients with ours, in float64.

    Args:
        config: see `Learn2Learn`.
        first: see `Learn2Learn`.

    Returns:
        The larger relative distance of the two.
    """
    exact, batch = config.changed(dtype="float64"), first.to(dtype=torch.float64)
    learner = build_learner(exact)
    theirs = learn2learn(_case(exact, learner, batch))
    loss = learner(batch).loss
    loss.backward()
    ours = flat(gradients_of(learner.model, learner.update if isinstance(learner.update, KFO) else None))
    other = theirs.run()
    found = flat(theirs.gradients())
    distances = [(found - ours).norm() / ours.norm(), (other - loss.detach()).abs() / loss.detach().abs()]
    # torch's max, as Python's may drop a NaN.
    return torch.stack(distances).max().item()


def _case(config: Config, learner: MAML, batch: TaskBatch) -> MetaCase:
    """The case from which the benchmarks' contenders are built."""
    ways = config.data_set.outputs(config.options_of(config.data_set))
    network = replace(NETWORKS["omniglot_cnn2"], layers=config.layers, hidden=config.hidden, ways=ways)
    factors: Any = learner.update.factors() if isinstance(learner.update, KFO) else None
    return MetaCase(network, learner.model, factors, batch, config.inner_lr, config.steps)


def _check(argument: str, config: Config, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if config.values.get(name, value) != value:
            raise ValueError(f"{argument}: expected {name} = {value!r}, got {config.values[name]!r}")
