"""A sequence of learned updates."""

from __future__ import annotations

from torch import Tensor

from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.several import Several


class Chain(Several):
    """U(g) = U_k(... U_2(U_1(g))): `Chain(MetaSGD(named), KFO(named))` scales gradients, then transforms them.

    It takes as many inner steps as every update has meta-parameters for.

    Args:
        updates: at least one, in the order in which they are applied, all made for the same parameters.

    Raises:
        ValueError: there is no update, meta-parameters occur twice, or updates were made for different parameters,
            dtypes or devices.
        TypeError: an argument is not an `Update`.
    """

    def __init__(self, *updates: Update) -> None:
        if not updates:
            raise ValueError("updates: expected at least one Update, got none")
        for i, update in enumerate(updates):
            if not isinstance(update, Update):
                got = repr(update) if isinstance(update, type) else type(update).__name__
                raise TypeError(f"updates[{i}]: expected an Update such as KFO(parameters), got {got}")
        rows = [id(row) for update in updates for row in update.phi]
        if len(set(rows)) < len(rows):
            raise ValueError(
                "updates: expected each update once, got meta-parameters that occur twice; make two updates"
            )
        first = updates[0]
        for i, update in enumerate(updates[1:], 1):
            _check_alike(i, update, first)
        super().__init__(next((update.packing for update in updates if update.packing.named), first.packing), updates)

    def rule(self, phi: Phi, G: Tensor, step: int | None = None) -> Tensor:
        """Apply the updates in order.

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.
            step: the inner step, required if one of the updates has meta-parameters per step.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi has another number of rows, or an update has no meta-parameters for the step.
        """
        U = G
        for update, own in self.shares(phi):
            U = update.rule_at(own, U, step)
        return U


def _check_alike(i: int, update: Update, first: Update) -> None:
    """Raise ValueError unless the update was made for the parameters of the first one."""
    mine, theirs = update.packing, first.packing
    if len(mine) != len(theirs):
        raise ValueError(
            f"updates[{i}]: expected one made for the {len(theirs)} parameters of updates[0], got one for {len(mine)}"
        )
    renamed = mine.named and theirs.named
    for name, shape, other_name, other_shape in zip(mine.names, mine.shapes, theirs.names, theirs.shapes):
        if shape != other_shape or (renamed and name != other_name):
            raise ValueError(
                f"updates[{i}]: expected one made for {other_name!r} {tuple(other_shape)} as updates[0], "
                f"got one made for {name!r} {tuple(shape)}"
            )
    for row, other in zip(update.phi[:1], first.phi[:1]):
        if (row.dtype, row.device) != (other.dtype, other.device):
            raise ValueError(
                f"updates[{i}]: expected meta-parameters of {other.dtype} on {other.device} as updates[0] has, "
                f"got {row.dtype} on {row.device}"
            )
