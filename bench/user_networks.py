"""Networks as users write them with torch.nn: a residual one with max pooling, and a dense one with layer norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm, a 1x1 shortcut, then max pooling: a block of ResNet-12.

    (n, in_channels, h, w) -> (n, out_channels, h // 2, w // 2).

    Source:
        Oreshkin, Rodriguez Lopez and Lacoste 2018 (TADAM).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels, out_channels):
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, out_channels, h // 2, w // 2)."""
        return self.pool(torch.relu(self.layers(x) + self.shortcut(x)))


class ResNet(nn.Module):
    """Residual blocks, the spatial mean and a linear head: ResNet-12 with narrow layers."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], ways: int) -> None:
        super().__init__()
        sizes = zip((in_channels, *widths), widths)
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in sizes))
        self.head = nn.Linear(widths[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, ways) logits."""
        return self.head(self.blocks(x).mean((2, 3)))


def dense_network(pixels: int, width: int, ways: int) -> nn.Sequential:
    """Four linear layers, layer norm and ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (pixels, width, width):
        layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, ways))
