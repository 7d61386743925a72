"""Learned rates per parameter tensor and inner step, which multiply an update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.updates.checks import check_count, check_packed, check_step


class StepRates(nn.Module):
    """r[t, i] U_i(g) in inner step t, for parameter tensor i; all rates start at 1.

    Adapting them in the inner loop has no effect, since a step's rates are used in that step only.

    Args:
        packing: of the parameters.
        steps: the number of inner steps that have rates.
        like: a tensor that gives dtype and device.

    Source:
        MAML++ (Antoniou et al. 2019), learned rates per layer and step.
    """

    def __init__(self, packing: Packing, steps: int, like: Tensor) -> None:
        super().__init__()
        self.steps = check_count("per_step", steps, "the number of inner steps")
        self.count = len(packing)
        # (1, steps * parameters), step after step.
        self.row = nn.Parameter(torch.ones((1, self.steps * self.count), dtype=like.dtype, device=like.device))
        self._flat = Packing(packing.names, [torch.Size((size,)) for size in packing.sizes])

    def rule(self, row: Tensor, U: Tensor, step: int | None) -> Tensor:
        """Multiply updates by the step's rates.

        Args:
            row: (tasks or 1, steps * parameters), the rates to use instead of the module's own.
            U: (tasks, n), packed updates.
            step: the inner step, 0 for the first.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: the step has no rates, or a tensor has another shape.
            TypeError: there are several dtypes outside autocast.
        """
        check_packed("StepRates", (row,), (self.row,), U, self._flat.numel)
        mine = row.narrow(1, check_step(step, self.steps) * self.count, self.count)
        wide = [rate.expand(-1, size) for rate, size in zip(mine.split(1, dim=1), self._flat.sizes)]
        return U * self._flat.join(wide, len(row))
