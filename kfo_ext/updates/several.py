"""The base class of updates made of several others: their meta-parameters, steps and options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import check_number


class Several(Update):
    """An update made of others; its meta-parameters are theirs, one after the other.

    Args:
        parameters: as for `Update`.
        updates: the updates that it is made of, at least one.
    """

    def __init__(self, parameters: Iterable[Tensor | tuple[str, Tensor]] | Packing, updates: Sequence[Update]) -> None:
        super().__init__(parameters)
        self.updates = nn.ModuleList(updates)
        self.steps = min((update.steps for update in updates if update.steps is not None), default=None)
        self._counts = [len(update.phi) for update in updates]

    @property
    def _updates(self) -> list[Update]:
        return cast("list[Update]", list(self.updates))

    @property
    def phi(self) -> Phi:
        """The meta-parameters of each update, in order."""
        return tuple(row for update in self._updates for row in update.phi)

    def shares(self, phi: Phi) -> list[tuple[Update, Phi]]:
        """Split phi into the meta-parameters of each update.

        Args:
            phi: as `self.phi`.

        Returns:
            Each update with its own meta-parameters.

        Raises:
            ValueError: phi has another number of rows than `self.phi`.
        """
        check_number(type(self).__name__, phi, sum(self._counts))
        shares, start = [], 0
        for update, count in zip(self._updates, self._counts):
            shares.append((update, phi[start : start + count]))
            start += count
        return shares

    def options(self) -> dict[str, Any]:
        """The options of each update, by its position."""
        found: dict[str, Any] = {"updates": len(self.updates)}
        for i, update in enumerate(self._updates):
            found[f"{i}.update"] = type(update).__name__
            found.update({f"{i}.{name}": value for name, value in update.options().items()})
        return found
