"""The table of networks: options, and the input shapes of each. Loads torch only when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from kfo_ext.choices import INITS, MOST_LAYERS

from .options import MACHINE, TRAINING, Option, Part

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Network(Part):
    """A row of `NETWORKS`.

    Attributes:
        make: builds the network from the shape of one example, the number of its outputs, and the options by name.
        inputs: the shape of the examples that it takes; None for one size is any size, None as a whole is any shape.
        head: whether it has a method `features` and a submodule `head`, as ANIL requires.
        convolutions: whether it has convolutions, whose precision may be chosen.
    """

    make: Callable[..., nn.Module]
    inputs: tuple[int | None, ...] | None
    head: bool = False
    convolutions: bool = False

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether examples of this shape fit."""
        if self.inputs is None:
            return True
        return len(shape) == len(self.inputs) and all(own in (None, size) for own, size in zip(self.inputs, shape))


def _omniglot_cnn(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
    from kfo_ext.networks import omniglot_cnn

    del inputs
    return omniglot_cnn(ways=outputs, **options)


def _cifar_fs_cnn(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
    from kfo_ext.networks import cifar_fs_cnn

    del inputs
    return cifar_fs_cnn(ways=outputs, **options)


def _pooled_cnn(inputs: tuple[int, ...], outputs: int, *, layers: int, **options: Any) -> nn.Module:
    from kfo_ext.networks.cnn import CNN, pools

    channels, height, width = inputs
    if height != width:
        raise ValueError(f"network: 'pooled_cnn' takes square images, got {height} x {width}")
    options |= {"in_channels": channels, "image_size": height, "pool": pools(layers)}
    return CNN(layers, ways=outputs, mean=False, **options)


def _sinusoid_mlp(inputs: tuple[int, ...], outputs: int, *, hidden: int) -> nn.Module:
    from kfo_ext.networks import sinusoid_mlp

    del inputs
    if outputs != 1:
        raise ValueError(f"network: expected one with {outputs} outputs, got 'sinusoid_mlp', which has one")
    return sinusoid_mlp(hidden)


def _linear(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    from kfo_ext.networks import LinearModel

    return LinearModel(prod(inputs), outputs)


CNN = {
    "layers": Option(kind=int, default=2, help="convolution blocks", least=1, most=MOST_LAYERS),
    "hidden": Option(kind=int, default=32, help="channels of a block", least=1),
    "init": Option(
        kind=str, default="reference", help="start of the network: see kfo_ext.networks", choices=INITS, role=TRAINING
    ),
    "channels_last": Option(
        kind=bool,
        default=False,
        help="torch's convolutions in channels-last memory (CUDA, or bf16)",
        role=MACHINE,
    ),
}

NETWORKS: dict[str, Network] = {
    "omniglot_cnn": Network(
        help="CNN of stride-2 blocks for 1x28x28 images",
        make=_omniglot_cnn,
        options=CNN,
        inputs=(1, 28, 28),
        head=True,
        convolutions=True,
    ),
    "cifar_fs_cnn": Network(
        help="CNN of stride-1 blocks for 3x32x32 images",
        make=_cifar_fs_cnn,
        options=CNN,
        inputs=(3, 32, 32),
        head=True,
        convolutions=True,
    ),
    "pooled_cnn": Network(
        help="CNN of max-pooled blocks for square images, flattened",
        make=_pooled_cnn,
        options=CNN,
        inputs=(None, None, None),
        head=True,
        convolutions=True,
        # A larger rate diverges with hundreds of flattened features.
        defaults={"inner_lr": 0.01},
    ),
    "sinusoid_mlp": Network(
        help="two hidden layers of ReLU units",
        make=_sinusoid_mlp,
        options={"hidden": Option(kind=int, default=32, help="units of a hidden layer", least=1)},
        inputs=(1,),
        head=True,
    ),
    "linear": Network(
        help="one linear layer: linear, logistic or softmax regression",
        make=_linear,
        inputs=None,
        head=True,
    ),
}
