"""ANIL: MAML that adapts the head alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfo_ext.models import tasks_features
from kfo_ext.tasks import TaskBatch
from kfo_ext.transform.packing import Packing

from .calls import exclusive
from .learner import MAML


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
            with exclusive(), self._precision(x):
                features = torch.stack([self.model.features(each) for each in x])
        if self.bf16:
            features = features.float()
        return features.split([batch.support.x.shape[1], batch.query.x.shape[1]], 1)
