"""The paper's linear models: softmax and logistic regression, and the one-dimensional models of section 4."""

from __future__ import annotations

from torch import Tensor, nn

from kfo_ext.networks.linnet import LinNet

# Widths of the LinNet of softmax regression (paper, appendix D).
SOFTMAX_WIDTHS = (256, 128, 64, 64)


class LinearModel(nn.Module):
    """(n, ...) -> (n, out): one linear layer on the flattened examples, Xavier-uniform with zero bias.

    Args:
        in_features: numbers per example.
        out_features: classes, or 1.
        bias: whether the layer has a bias.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        for name, value in {"in_features": in_features, "out_features": out_features}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        self.head = nn.Linear(in_features, out_features, bias)
        nn.init.xavier_uniform_(self.head.weight)
        if bias:
            nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, in_features)."""
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, out_features)."""
        return self.head(self.features(x))


def softmax_regression(in_features: int, ways: int = 5) -> LinearModel:
    """(n, ...) -> (n, ways) logits of pixels: 784 for Omniglot, 3072 for CIFAR-FS (paper, section 5.1)."""
    return LinearModel(in_features, ways)


def logistic_regression(dimension: int = 2) -> LinearModel:
    """(n, dimension) -> (n, 1) logits c^T x; with LinNet a^T B x (paper, section 4.2 and appendix B.1)."""
    return LinearModel(dimension, 1, bias=False)


def shallow_regression() -> LinearModel:
    """(n, 1) -> (n, 1): SHALLOW, c x; c is `head.weight` (paper, equation 6)."""
    return LinearModel(1, 1, bias=False)


def deep_regression(layers: int = 2) -> LinNet:
    """(n, 1) -> (n, 1): DEEP, a b x, the LinNet of SHALLOW; b is `head[0].weight`, a is `head[1].weight`.

    Args:
        layers: factors of x, at least 2.

    Returns:
        The network.

    Raises:
        ValueError: `layers` is not an integer of at least 2.

    Source:
        paper, equation 7.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 2:
        raise ValueError(f"layers: expected an integer of at least 2, got {layers!r}")
    return LinNet(shallow_regression(), [1] * (layers - 1))
