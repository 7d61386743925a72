"""A network of your own, of plain torch modules with group norm: nothing in it knows of meta-learning.

python experiments/examples/own_network.py [meta-iterations]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from kfo_ext import KFO, MAML
from kfo_ext.tasks import Glyphs


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


class Net(nn.Module):
    def __init__(self, channels: int = 16, ways: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=4, padding=1)
        self.body = nn.Sequential(Residual(channels), nn.GroupNorm(4, channels), nn.ReLU())
        self.head = nn.Linear(4 * channels, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(adaptive_avg_pool2d(self.body(self.stem(x)), 2).flatten(1))


def main(iterations: int = 50) -> None:
    torch.manual_seed(0)
    model = Net()
    # Its `adapted` may name a part alone, such as ["head.*", "body.*"]; a KFO is then made of that part.
    maml = MAML(model, update=KFO(model.named_parameters()), lr=0.4, steps=3, adapt_update=True)
    outer = torch.optim.Adam(maml.parameters(), lr=0.003)
    train = Glyphs("train")
    losses = []
    for number in range(iterations):
        outer.zero_grad()
        result = maml(train.sample(number, tasks=4))
        result.loss.backward()
        outer.step()
        losses.append(result.loss.item())
    print(f"computed by: {maml.route}")  # all tasks in one forward, or task by task and why
    few = max(1, iterations // 5)
    print(f"query loss of the first {few} meta-iterations {sum(losses[:few]) / few:.3f}, ", end="")
    print(f"of the last {few} {sum(losses[-few:]) / few:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
