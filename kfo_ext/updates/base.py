"""The one base class of learned updates: what a learner, and a loop of one's own, call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing, listed
from kfo_ext.updates.gradients import gradients

# Packed meta-parameters, (1, n) each.
Phi = tuple[Tensor, ...]


class Update(nn.Module, ABC):
    """U(g): turns gradients into updates, by meta-parameters phi that may be learned, and adapted per task.

    A subclass defines `phi` and `rule`; `MAML(model, update=...)` takes it. It should start as plain gradient descent,
    U(g) = g, and must treat each task's row by itself.

    Args:
        parameters: the tensors that it updates, or (name, tensor) pairs such as `model.named_parameters()`; or how
            they are packed.
    """

    def __init__(self, parameters: Iterable[Tensor | tuple[str, Tensor]] | Packing) -> None:
        super().__init__()
        self.packing = parameters if isinstance(parameters, Packing) else Packing.of(parameters)

    @property
    @abstractmethod
    def phi(self) -> Phi:
        """All meta-parameters, packed (1, n_i) each; () learns nothing."""

    @abstractmethod
    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """U(g), a pure function of packed tensors, differentiable by both.

        Args:
            phi: as `self.phi`, with (tasks or 1, n_i) rows.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.
        """

    def transform(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The updates of a list of gradients, one per parameter, None where the gradient is None.

        Args:
            grads: tensors of the parameters' shapes, or all of them with one leading task dimension.

        Raises:
            ValueError: another length, a shape, task dimension or device that does not fit.
            TypeError: a dtype other than that of the meta-parameters.
        """
        grads = listed(grads, "grads")
        packing = self.packing
        rows = packing.tasks(grads, "grads")
        present = next((grad for grad in grads if grad is not None), None)
        if present is None:
            return [None] * len(grads)
        for row in self.phi[:1]:
            if present.dtype != row.dtype and not torch.is_autocast_enabled(present.device.type):
                raise TypeError(f"grads: expected {row.dtype} as the meta-parameters have, got {present.dtype}")
            if present.device != row.device:
                raise ValueError(f"grads: expected device {row.device} as the meta-parameters, got {present.device}")
        updates = packing.unpack(self.rule(self.phi, packing.pack(grads, "grads")), batched=rows is not None)
        return [None if grad is None else update for grad, update in zip(grads, updates)]

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool | None = None,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """Differentiates `loss` by `parameters` and returns their updates, None where there is no gradient.

        Args:
            loss: (), the loss.
            parameters: the tensors to update, in the order given to the constructor.
            create_graph: keep the graph of the gradients, for second-order meta-gradients.
            retain_graph: keep the loss's graph; as `create_graph` by default.
            allow_unused: parameters the loss does not depend on get None.
            allow_nograd: parameters that do not require a gradient get None.

        Raises:
            ValueError: a loss that is no scalar or has no graph; a list of another length or shapes; a frozen or unused
                parameter without its flag.
        """
        grads = gradients(
            loss,
            parameters,
            self.packing,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        return self.transform(grads)
