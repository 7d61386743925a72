"""Networks of linear layers."""

from __future__ import annotations

from torch import nn


def sinusoid_mlp(hidden: int = 40) -> nn.Sequential:
    """(n, 1) -> (n, 1): two hidden layers of `hidden` ReLU units (Finn et al. 2017, section 5.1)."""
    return nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
