"""ANIL: MAML that adapts the head alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.tasks import TaskBatch

from .calls import exclusive
from .learner import MAML
from .routes import Route, Vmapped, tasks_at_once


class ANIL(MAML):
    """MAML that adapts the head alone: the body's features are computed once per task and shared by all inner steps.

    The body sees support and query examples in one forward, so its batch statistics are over both, as in the reference.

    Args:
        model: a module with a method `features(x)` and a submodule `head`.
        update: a KFO made for `model.head`'s parameters, or None.
        options: as for `MAML`.

    Raises:
        TypeError: a model without `features` or `head`.
        ValueError: as `MAML`.

    Source: Raghu et al. 2020; paper, appendix B.5.
    """

    def __init__(self, model: nn.Module, **options) -> None:
        if not callable(getattr(model, "features", None)) or not isinstance(getattr(model, "head", None), nn.Module):
            children = ", ".join(name for name, _ in model.named_children()) if isinstance(model, nn.Module) else ""
            raise TypeError(
                "model: expected a module with a method features(x) and a submodule named head, got "
                f"{type(model).__name__}{f' with {children}' if children else ''}"
            )
        super().__init__(model, **options)
        # In a tuple, so that it is no submodule: its parameters are the model's.
        self._body = (_Body(model),)

    _part = "head"

    @property
    def adapted(self) -> nn.Module:
        """The head."""
        return self.model.head

    def _at_once(self, theta: Tensor, batch: TaskBatch) -> int:
        # The shape alone counts: one task's examples stand for all.
        x = _together(batch.split(1)[0]).expand(len(batch.support.x), -1, *batch.support.x.shape[2:])
        route, _ = self._body_route(x)
        return tasks_at_once(route, x, x.shape[1])

    def _body_route(self, x: Tensor) -> tuple[Route, Tensor]:
        """The route of the features, and the packed parameters (1, n) that they are made with."""
        (body,) = self._body
        trained = [(name, p) for name, p in body.named_parameters() if p.requires_grad]
        packing = Packing.of(trained)
        theta = packing.pack([p for _, p in trained]) if trained else x.new_zeros((1, 0), dtype=torch.float32)
        return self._choose("body", body, packing, theta, x), theta

    def features(self, x: Tensor) -> Tensor:
        """(tasks, n, ...) to (tasks, n, features)."""
        with exclusive():
            route, theta = self._body_route(x)
            with self._precision(x):
                if isinstance(route, Vmapped):
                    features = route.outputs(route.leaves(theta.expand(len(x), -1)), x)
                else:
                    features = torch.stack([self.model.features(each) for each in x])
        return features.float() if self.bf16 else features

    def inputs(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The features of support and query examples, of one forward: (tasks, n, features) each."""
        return self.features(_together(batch)).split([part.x.shape[1] for part in batch], 1)


class _Body(nn.Module):
    """The features of a model, as a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.features(x)


def _together(batch: TaskBatch) -> Tensor:
    return torch.cat([batch.support.x, batch.query.x], 1)
