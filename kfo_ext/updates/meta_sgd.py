"""Meta-SGD: a learned rate for each element of each parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfo_ext.packing import listed
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import check_packed, named_alike
from kfo_ext.updates.rates import StepRates


class MetaSGD(Update):
    """U(g) = a g, element by element; a is learned and starts at 1.

    The inner loop may adapt a too (`adapt_update`, the idea of Alpha-MAML).

    Args:
        parameters: the tensors to update, or (name, tensor) pairs such as `model.named_parameters()`.
        per_step: the number of inner steps that have their own rate for each parameter tensor, in front of a; each is 1
            at the start. None for none.

    Raises:
        ValueError: there are no parameters, devices are mixed, or `per_step` is less than 1.
        TypeError: an entry is not a tensor, parameters are not floating point of one dtype, or `per_step` is not an
            integer.

    Source:
        Li et al. 2017, Meta-SGD; its rates are a times the learner's lr.
    """

    def __init__(self, parameters: Iterable[Tensor | tuple[str, Tensor]], *, per_step: int | None = None) -> None:
        parameters = listed(parameters, "parameters", pairs=True)
        super().__init__(parameters)
        like = named_alike(parameters)[0][1]
        self.a = nn.Parameter(torch.ones((1, self.packing.numel), dtype=like.dtype, device=like.device))
        self.rates = None if per_step is None else StepRates(self.packing, per_step, like)
        self.steps = per_step

    @property
    def phi(self) -> Phi:
        """The learned a, (1, n), and the rates of the steps if there are any."""
        return (self.a,) if self.rates is None else (self.a, self.rates.row)

    def rule(self, phi: Phi, G: Tensor, step: int | None = None) -> Tensor:
        """Compute a g, times the rates of the step.

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.
            step: the inner step, with `per_step`.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi has another number of rows, or rows of another length; or the step has no rates.
        """
        check_packed("MetaSGD", phi, self.phi, G, self.packing.numel)
        U = phi[0] * G
        return U if self.rates is None else self.rates.rule(phi[1], U, step)

    def options(self) -> dict[str, Any]:
        """The number of steps that have rates."""
        return {"per_step": self.steps}
