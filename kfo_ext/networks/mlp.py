"""Networks of linear layers with ReLU between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """(n, in) -> (n, out): hidden layers of ReLU units, and a linear head.

    Args:
        sizes: in, the units of each hidden layer, out.

    Raises:
        TypeError: `sizes` is no sequence.
        ValueError: there are fewer than three sizes, or one is not an integer of at least 1.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        if isinstance(sizes, str) or not isinstance(sizes, Sequence):
            raise TypeError(f"sizes: expected a sequence of integers, such as [1, 40, 40, 1], got {sizes!r}")
        if len(sizes) < 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"sizes: expected at least three, each an integer of at least 1, got {sizes!r}")
        *hidden, out = sizes
        self.body = nn.Sequential(*(layer for p, q in pairwise(hidden) for layer in (nn.Linear(p, q), nn.ReLU())))
        self.head = nn.Linear(hidden[-1], out)

    def features(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, head.in_features)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        return self.head(self.features(x))


def sinusoid_mlp(hidden: int = 40) -> MLP:
    """(n, 1) -> (n, 1): two hidden layers of `hidden` ReLU units (Finn et al. 2017, section 5.1)."""
    return MLP([1, hidden, hidden, 1])
