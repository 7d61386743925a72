"""The table of methods: how each transforms the network, and what it adapts. Loads torch only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import Option, Part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kfo_ext.adapt import MAML

Named = Iterable[tuple[str, "Tensor"]]


def _unchanged(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True, kw_only=True)
class Method(Part):
    """A row of `METHODS`.

    Attributes:
        adapted: the parameters of the network that the inner loop adapts, for which the update is made.
        learner: builds the learner of a network, with the keywords of `MAML`.
        transformed: transforms the network first, with the method's options as keywords.
        head: whether it requires a network with a head.
    """

    adapted: Callable[[nn.Module], Named]
    learner: Callable[..., MAML]
    transformed: Callable[..., nn.Module] = _unchanged
    head: bool = False


def _all(network: nn.Module) -> Named:
    return network.named_parameters()


def _head(network: nn.Module) -> Named:
    return network.get_submodule("head").named_parameters()


def _body(network: nn.Module) -> Named:
    body = [(name, X) for name, X in network.named_parameters() if not name.startswith("head.")]
    if not body:
        raise ValueError("method: 'boil' adapts all but the head, and this network is a head alone")
    return body


def _stack(network: Any) -> Named:
    return network.head.named_parameters()


def _without_t(network: Any) -> Named:
    named = dict(network.named_parameters())
    return [(name, named[name]) for name in network.adapted if name in named]


def _maml(network: nn.Module, **options: Any) -> MAML:
    from kfo_ext.adapt import MAML

    return MAML(network, **options)


def _boil(network: nn.Module, **options: Any) -> MAML:
    return _maml(network, adapted=[name for name, _ in _body(network)], **options)


def _anil(network: nn.Module, **options: Any) -> MAML:
    from kfo_ext.adapt import ANIL

    return ANIL(network, **options)


def _tnet(network: nn.Module) -> nn.Module:
    from kfo_ext.networks import TNet

    return TNet(network)


def _linnet(network: nn.Module, *, widths: str | None) -> nn.Module:
    from kfo_ext.networks import LinNet

    try:
        sizes = None if widths is None else [int(width) for width in widths.split(",")]
    except ValueError:
        raise ValueError(f"widths: expected integers with commas between them, got {widths!r}") from None
    return LinNet(network, sizes)


WIDTHS = {
    "widths": Option(
        kind=str,
        default=None,
        shown="the head's inputs, twice",
        help="of the layers, with commas between them: 256,128,64,64",
    )
}

METHODS: dict[str, Method] = {
    "maml": Method(help="adapts all parameters", adapted=_all, learner=_maml),
    "anil": Method(help="adapts the head only", adapted=_head, learner=_anil, head=True),
    "boil": Method(help="adapts all but the head", adapted=_body, learner=_boil, head=True),
    "tnet": Method(
        help="T-Net: a linear map after every layer, which only meta-learning changes",
        adapted=_without_t,
        learner=_maml,
        transformed=_tnet,
    ),
    "linnet": Method(
        help="LinNet: linear layers replace the head",
        adapted=_all,
        learner=_maml,
        transformed=_linnet,
        options=WIDTHS,
    ),
    "anil_linnet": Method(
        help="LinNet that adapts its linear layers only",
        adapted=_stack,
        learner=_anil,
        transformed=_linnet,
        options=WIDTHS,
        head=True,
    ),
}
