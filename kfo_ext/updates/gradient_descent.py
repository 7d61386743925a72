"""Plain gradient descent, as an update."""

from __future__ import annotations

from torch import Tensor, nn

from kfo_ext.updates.base import Phi, Update


class GradientDescent(Update):
    """U(g) = g: learns nothing, copies nothing, and adds nothing to a state_dict.

    Args:
        parameters: as for `Update`.
    """

    # There is nothing to load, so nothing that a state could fail to fit.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @property
    def phi(self) -> Phi:
        """No meta-parameters."""
        return ()

    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """G itself."""
        return G

    def transform_checked(self, grads: list[Tensor | None], rows: int | None) -> list[Tensor | None]:
        """The gradients themselves."""
        return grads
