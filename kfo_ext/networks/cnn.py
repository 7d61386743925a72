"""CNN(k), the paper's network for few-shot images.

A block is a 3x3 convolution with padding 1, batch norm by batch statistics, ReLU and, for mini-ImageNet, max-pooling.
Convolutions start Xavier-uniform with zero bias. `INITS` names the initialization of the rest:

    reference   batch-norm weights uniform in (0, 1), head N(0, 1) for Omniglot and Xavier-uniform elsewhere: the
                initialization of the reference implementations
    zero_head   batch-norm weights 1, head 0: every task starts from equal logits, which lets plain MAML use larger
                inner rates
    torch       batch-norm weights 1, head weights as torch.nn.Linear's default: uniform in +-1 / sqrt(features)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfo_ext.choices import INITS


class Block(nn.Module):
    """Convolution, batch norm, ReLU and max-pooling.

    (n, in_channels, h, w) -> (n, hidden, ceil(h / stride) // pool, ceil(w / stride) // pool).

    Args:
        in_channels: channels of the input.
        hidden: channels of the output.
        stride: stride of the convolution.
        pool: max-pool size; 1 for none.
    """

    def __init__(self, in_channels: int, hidden: int, *, stride: int, pool: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden, 3, stride=stride, padding=1)
        # Batch statistics always, in training and evaluation: the paper's transductive setting.
        self.norm = nn.BatchNorm2d(hidden, eps=1e-5, track_running_stats=False)
        self.pool = nn.MaxPool2d(pool) if pool > 1 else nn.Identity()
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.constant_(self.conv.get_parameter("bias"), 0)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, hidden, h', w')."""
        return self.pool(torch.relu(self.norm(self.conv(x))))


class CNN(nn.Module):
    """CNN(layers): blocks, then a linear head on the spatial mean or on the flattened features.

    Args:
        layers: number of blocks.
        in_channels: channels of the images.
        hidden: channels of every block.
        ways: classes.
        image_size: height and width of the images.
        stride: stride of every convolution.
        pool: max-pool size after every block, or one size for each block in order; 1 for none.
        mean: whether the head's input is the spatial mean (else the flattened features).
        normal_head: with init "reference", draw head weights from N(0, 1) (Omniglot's), else Xavier-uniform.
        init: the initialization, one of `INITS`.
        channels_last: whether torch's convolutions compute in that memory format. It affects speed only; the compiled
            convolutions on the CPU always use it.

    Raises:
        ValueError: a number is below 1, `init` is unknown, or the blocks shrink the image to nothing.

    Source:
        paper, section 5 and appendix D.
    """

    def __init__(
        self,
        layers: int,
        *,
        in_channels: int,
        hidden: int,
        ways: int,
        image_size: int,
        stride: int = 1,
        pool: int | Sequence[int] = 1,
        mean: bool = True,
        normal_head: bool = False,
        init: str = "reference",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        numbers = {
            "layers": layers,
            "in_channels": in_channels,
            "hidden": hidden,
            "ways": ways,
            "image_size": image_size,
        }
        for name, value in {**numbers, "stride": stride}.items():
            _check_count(name, value)
        pools = list(pool) if isinstance(pool, Sequence) else [pool] * layers
        if len(pools) != layers:
            raise ValueError(f"pool: expected one size for each of {layers} blocks, got {pool!r}")
        for value in pools:
            _check_count("pool", value)
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
        self.blocks = nn.Sequential(
            *(Block(hidden if i else in_channels, hidden, stride=stride, pool=size) for i, size in enumerate(pools))
        )
        self.mean = mean
        self.channels_last = channels_last
        side = image_size
        for size in pools:
            side = -(-side // stride) // size
        if side < 1:
            raise ValueError(
                f"image_size: {layers} blocks of stride {stride} and pool {pool} leave nothing of {image_size} pixels"
            )
        self.head = nn.Linear(hidden if mean else hidden * side * side, ways)
        self._initialise(init, normal_head)

    def _initialise(self, init: str, normal_head: bool) -> None:
        nn.init.zeros_(self.head.bias)
        if init == "zero_head":
            nn.init.zeros_(self.head.weight)
        if init != "reference":
            return
        for block in self.blocks:
            nn.init.uniform_(block.get_parameter("norm.weight"))
        if normal_head:
            nn.init.normal_(self.head.weight)
        else:
            nn.init.xavier_uniform_(self.head.weight)

    def features(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) -> (n, head.in_features)."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.blocks(x)
        return x.mean(dim=(2, 3)) if self.mean else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) -> (n, ways) logits."""
        return self.head(self.features(x))


def omniglot_cnn(
    layers: int = 2, ways: int = 5, hidden: int = 32, init: str = "reference", channels_last: bool = False
) -> CNN:
    """CNN(layers) for 1x28x28 images: stride-2 blocks, spatial mean (paper, appendix D)."""
    return CNN(
        layers,
        in_channels=1,
        hidden=hidden,
        ways=ways,
        image_size=28,
        stride=2,
        normal_head=True,
        init=init,
        channels_last=channels_last,
    )


def cifar_fs_cnn(
    layers: int = 2, ways: int = 5, hidden: int = 32, init: str = "reference", channels_last: bool = False
) -> CNN:
    """CNN(layers) for 3x32x32 images: stride-1 blocks, spatial mean (paper, appendix D)."""
    return CNN(layers, in_channels=3, hidden=hidden, ways=ways, image_size=32, init=init, channels_last=channels_last)


def mini_imagenet_cnn(
    layers: int = 2, ways: int = 5, hidden: int = 64, init: str = "reference", channels_last: bool = False
) -> CNN:
    """Return CNN(layers) for 3x84x84 images: stride-1 blocks with max-pooling, 5x5xhidden flattened features.

    The reference pools by 4 in each of 2 blocks and by 2 in each of 4 (paper, appendix D), and has no consistent
    setting for other depths. Here the blocks pool by 16 in total at every depth, the first blocks first: 4, 2, 2 for 3
    blocks, and the last two of 6 do not pool.

    Args:
        layers: number of blocks.
        ways: classes.
        hidden: channels of every block.
        init: the initialization, one of `INITS`.
        channels_last: whether torch's convolutions compute in that memory format.

    Returns:
        The network.
    """
    return CNN(
        layers,
        in_channels=3,
        hidden=hidden,
        ways=ways,
        image_size=84,
        pool=pools(layers),
        mean=False,
        init=init,
        channels_last=channels_last,
    )


def pools(layers: int) -> list[int]:
    """The pool sizes of `layers` blocks: a side shrinks by 16, four halvings dealt to the blocks in turn."""
    _check_count("layers", layers)
    return [2 ** len(range(i, 4, layers)) for i in range(layers)]


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
