"""What a network must offer: nothing for MAML but a forward of one tensor, and for ANIL the following."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class HasHead(Protocol):
    """A network that ANIL takes: forward(x) is head(features(x)).

    No class needs to derive from it. `ANIL(head="classifier")` takes a head by another name. A network whose head alone
    cannot be adapted has an attribute of its class, `head_alone`, a string that says why: ANIL refuses it with that.
    """

    def features(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, features): computed once for all inner steps."""
        ...

    @property
    def head(self) -> nn.Module:
        """The submodule that the inner loop adapts."""
        ...
