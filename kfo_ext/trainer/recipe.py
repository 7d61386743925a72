"""Builds the objects that a configuration names: task families, the learner, and the outer optimizer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kfo_ext.adapt import MAML
from kfo_ext.tasks import TaskFamily

from .config import Config
from .meta_step import outer_rate
from .updates import ADAPTED

# Validation and test tasks do not depend on the run's seed: every run is evaluated on the same lists.
EVALUATION_SEED = 0


def build_family(config: Config, split: str, *, seed: int) -> TaskFamily:
    """Build the tasks of one split, with their images on the run's device.

    Args:
        config: the run's configuration.
        split: train, validation or test.
        seed: of the stream of tasks; the classes of a split do not depend on it.

    Returns:
        The task family.

    Raises:
        ValueError: the device is not available.
        FileNotFoundError: the data is missing.
    """
    row = config.data_set
    return row.build(split, seed=seed, device=config.device, options=config.options_of(row))


def build_learner(config: Config, *, rated: int | None = None) -> MAML:
    """Build the network and its learned update, initialised from `config.seed`.

    Args:
        config: the run's configuration.
        rated: the number of inner steps with their own rates, if `per_step` is set; `config.steps` by default.

    Returns:
        The learner.

    Raises:
        ValueError: the device is not available.
    """
    torch.manual_seed(config.seed)
    data, method, update = config.data_set, config.method_row, config.update_row
    chosen, row = config.options_of(data), config.network_row
    network = row.make(data.inputs(chosen), data.outputs(chosen), **config.options_of(row))
    network = method.transformed(network, **config.options_of(method))
    try:
        network.to(config.device, config.torch_dtype)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {config.device!r} is not available here ({error})") from None
    options = {name: value for name, value in config.options_of(update).items() if name not in ADAPTED}
    if "per_step" in options:
        options["per_step"] = (rated or config.steps) if options["per_step"] else None
    learner = method.learner(
        network,
        update=update.make(method.adapted(network), **options),
        lr=config.inner_lr,
        # The constructor requires a step; an evaluation may have none.
        steps=max(config.steps, 1),
        adapt_update=config.values.get("adapt_update", False),
        first_order=config.first_order,
        loss=getattr(F, data.loss),
        metric=data.metric,
        checkpoint=config.checkpoint_inner,
        bf16=config.precision == "bf16",
    )
    learner.steps = config.steps
    return learner


def build_optimizer(config: Config, learner: MAML) -> torch.optim.Optimizer:
    """Build the outer optimizer: one group of all parameters, or with `meta_lr_update` a second one for the update's.

    Args:
        config: the run's configuration.
        learner: the learner whose parameters it steps.

    Returns:
        The optimizer.

    Raises:
        ValueError: `meta_lr_update` is set for an update without meta-parameters.
    """
    parameters = list(learner.parameters())
    of_update = set(learner.update.parameters()) if config.meta_lr_update else set()
    if config.meta_lr_update and not of_update:
        raise ValueError(
            f"meta_lr_update: has no effect with update {config.update!r}, which has no meta-parameters here"
        )
    device = parameters[0].device
    groups = [
        {"params": owned, "lr": outer_rate(lr, device)}
        for owned, lr in (
            ([p for p in parameters if p not in of_update], config.meta_lr),
            ([p for p in parameters if p in of_update], config.meta_lr_update),
        )
        if owned
    ]
    return config.optimizer_row.make(groups, **config.options_of(config.optimizer_row))
