"""Gradient descent, as an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kfo_ext.packing import Packing, listed
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import check_number, named_alike
from kfo_ext.updates.rates import StepRates


class GradientDescent(Update):
    """U(g) = g: learns nothing, copies nothing, and adds nothing to a state_dict.

    With `per_step` U(g) = r g, with a learned rate for each parameter tensor and inner step. `adapt_update` then has no
    effect, since the rates of a step are used in that step only.

    Args:
        parameters: as for `Update`; no `Packing` with `per_step`.
        per_step: the number of inner steps that have their own rates, each 1 at the start; None for no rates.

    Raises:
        ValueError: `per_step` is less than 1; with `per_step`, there are no parameters or devices are mixed.
        TypeError: `per_step` is not an integer; with `per_step`, parameters are not floating point of one dtype.
    """

    def __init__(
        self, parameters: Iterable[Tensor | tuple[str, Tensor]] | Packing, *, per_step: int | None = None
    ) -> None:
        if not isinstance(parameters, Packing):
            parameters = listed(parameters, "parameters", pairs=True)
        super().__init__(parameters)
        self.rates = None
        if per_step is not None:
            self.rates = StepRates(self.packing, per_step, named_alike(parameters)[0][1])
        self.steps = per_step

    @property
    def phi(self) -> Phi:
        """The rates, (1, per_step * parameters), or ()."""
        return () if self.rates is None else (self.rates.row,)

    def rule(self, phi: Phi, G: Tensor, step: int | None = None) -> Tensor:
        """G itself, or G times the step's rates; raises ValueError for a step that has no rates."""
        if self.rates is None:
            return G
        check_number("GradientDescent", phi, 1)
        return self.rates.rule(phi[0], G, step)

    def transform_checked(self, grads: list[Tensor | None], rows: int | None, step: int | None) -> list[Tensor | None]:
        """The gradients themselves; with rates, as in `Update`."""
        return grads if self.rates is None else super().transform_checked(grads, rows, step)

    def options(self) -> dict[str, Any]:
        """The number of steps that have rates."""
        return {"per_step": self.steps}

    # Without rates there is nothing to load, so every state fits.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.rates is None:
            del destination[prefix + "_extra_state"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing, key = args[2], prefix + "_extra_state"
        if self.rates is None and key in missing:
            missing.remove(key)
