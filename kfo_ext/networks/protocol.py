"""The interface of a network: MAML requires a forward of one tensor, ANIL the following as well."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class HasHead(Protocol):
    """A network that ANIL accepts: forward(x) is head(features(x)).

    No class needs to derive from it. `ANIL(head="classifier")` accepts a head of another name. A network whose head
    cannot be adapted alone has a class attribute `head_alone`, a string with the reason: ANIL refuses it with that.
    """

    def features(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, features): computed once for all inner steps."""
        ...

    @property
    def head(self) -> nn.Module:
        """The submodule that the inner loop adapts."""
        ...
