"""The table of methods: what each makes of the network, and what it adapts. No torch before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import Part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kfo_ext.adapt import MAML

Named = Iterable[tuple[str, "Tensor"]]


def _unchanged(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True, kw_only=True)
class Method(Part):
    """A row of `METHODS`.

    adapted: the parameters of the network that the inner loop adapts, for which the update is made.
    learner: the learner of a network, with the keywords of `MAML`.
    transformed: what the method makes of the network first, with the method's options as keywords.
    head: whether it needs a network that has one.
    """

    adapted: Callable[[nn.Module], Named]
    learner: Callable[..., MAML]
    transformed: Callable[..., nn.Module] = _unchanged
    head: bool = False


def _all(network: nn.Module) -> Named:
    return network.named_parameters()


def _head(network: nn.Module) -> Named:
    return network.get_submodule("head").named_parameters()


def _maml(network: nn.Module, **options: Any) -> MAML:
    from kfo_ext.adapt import MAML

    return MAML(network, **options)


def _anil(network: nn.Module, **options: Any) -> MAML:
    from kfo_ext.adapt import ANIL

    return ANIL(network, **options)


METHODS: dict[str, Method] = {
    "maml": Method(help="adapts all parameters", adapted=_all, learner=_maml),
    "anil": Method(help="adapts the head only", adapted=_head, learner=_anil, head=True),
}
