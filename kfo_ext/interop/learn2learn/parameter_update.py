"""learn2learn's ParameterUpdate: like torch.autograd.grad, but it returns updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

from kfo_ext.packing import Packing, listed
from kfo_ext.updates import Update
from kfo_ext.updates.gradients import gradients

from .transforms import Named, ours


class ParameterUpdate(nn.Module):
    """Gradients of a loss, each passed through its transform.

    Args:
        parameters: the tensors to update, or (name, tensor) pairs such as `model.named_parameters()`.
        transform: maps a parameter to its transform, a module or None (its gradient is its update). Those of this
            package make one update of all parameters, `update`; so do learn2learn's KroneckerTransform of
            KroneckerLinear and its MetaCurvatureTransform. Any other is called for each parameter.

    Raises:
        TypeError: a transform is neither a module nor None.
    """

    def __init__(
        self, parameters: Iterable[Tensor | Named], transform: Callable[[Tensor], nn.Module | None] | None
    ) -> None:
        super().__init__()
        entries = listed(parameters, "parameters", pairs=True)
        self.packing = Packing.of(entries)
        transform = ours(transform)
        self.update: Update | None = None
        together = getattr(transform, "together", None)
        if together is not None:
            self.update = together(entries)
            return
        if not callable(transform):
            got = type(transform).__name__
            raise TypeError(f"transform: expected a function from a parameter to its transform, got {got}")
        made = [transform(entry[1] if isinstance(entry, tuple) else entry) for entry in entries]
        for name, module in zip(self.packing.names, made):
            if module is not None and not isinstance(module, nn.Module):
                got = type(module).__name__
                raise TypeError(f"transform: expected a module or None for {name!r}, got {got}")
        self.transforms = nn.ModuleList(cast("list[nn.Module]", made))

    @property
    def steps(self) -> int | None:
        """As for an `Update`."""
        return None if self.update is None else self.update.steps

    def transform(self, grads: Iterable[Tensor | None], step: int | None = None) -> list[Tensor | None]:
        """The updates of gradients, one per parameter, or None if the gradient is None."""
        if self.update is not None:
            return self.update.transform(grads, step)
        grads = listed(grads, "grads")
        self.packing.tasks(grads, "grads")
        pairs: Iterable[tuple[Tensor | None, Any]] = zip(grads, self.transforms)
        return [grad if grad is None or module is None else module(grad) for grad, module in pairs]

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool | None = None,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The updates of `parameters`; arguments and errors are those of `Update.forward`."""
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
