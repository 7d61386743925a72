"""The three lines in which `kfo train` says what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kfo_ext.adapt.planned import planned_route

from .loop import Trainer


def described(trainer: Trainer) -> tuple[str, str, str]:
    """Three lines: the network; the update; data, route, device and threads."""
    config, learner, ranks = trainer.config, trainer.learner, trainer.ranks
    network, update, data = (
        f"{name}{_listed(config.options_of(part))}"
        for name, part in (
            (config.network, config.network_row),
            (config.update, config.update_row),
            (config.dataset, config.data_set),
        )
    )
    parameters = sum(X.numel() for X in learner.model.parameters())
    learned = sum(X.numel() for X in learner.update.parameters())
    example = trainer.tasks.sample(0, tasks=1).to(config.device, config.torch_dtype)
    processes = f", {ranks.size} processes" if ranks.size > 1 else ""
    threads = torch.get_num_threads()
    return (
        f"network: {network}, {parameters:,} parameters; {config.method} adapts {learner.packing.numel:,}",
        f"update: {update}, {learned:,} meta-parameters; inner steps {config.steps}, inner rate {config.inner_lr:g}",
        f"data: {data}; route {planned_route(learner, example)}; device {config.device}, "
        f"{threads} thread{'s' if threads > 1 else ''}{processes}",
    )


def _listed(options: Mapping[str, Any]) -> str:
    """Options in brackets, without those that have no value and flags that are off."""
    shown = [
        name if value is True else f"{name} {value}"
        for name, value in options.items()
        if value is not None and value is not False
    ]
    return f" ({', '.join(shown)})" if shown else ""
