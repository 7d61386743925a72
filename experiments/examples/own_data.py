"""Few-shot tasks from a data set of your own: any map-style data set whose items are (input, label).

python experiments/examples/own_data.py [meta-iterations]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kfo_ext import KFO, MAML
from kfo_ext.tasks import FewShot


class Clouds(Dataset):
    """20 points in 8 dimensions around the centre of each class."""

    def __init__(self, classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(20 * classes) % classes  # where it is there, no item is read for its label
        centres = torch.randn(classes, 8, generator=generator)
        self.x = centres[self.targets] + 0.7 * torch.randn(20 * classes, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.targets[index])


def main(iterations: int = 200) -> None:
    torch.manual_seed(0)
    # FewShot holds no class back: each split has data of its own classes.
    train = FewShot(Clouds(40, seed=1), ways=5, shots=2, queries=10)
    unseen = FewShot(Clouds(20, seed=2), ways=5, shots=2, queries=10, split="test").sample(0, tasks=200)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5))
    maml = MAML(model, update=KFO(model.named_parameters()), lr=0.3, steps=3, adapt_update=True)
    outer = torch.optim.Adam(maml.parameters(), lr=0.003)

    def accuracy() -> float:
        with torch.no_grad():
            metrics = maml(unseen).metrics
        assert metrics is not None
        return metrics.mean().item()

    print(f"before: accuracy on unseen classes {accuracy():.3f}")
    for number in range(iterations):
        outer.zero_grad()
        maml(train.sample(number, tasks=8)).loss.backward()
        outer.step()
    print(f"after {iterations} meta-iterations: {accuracy():.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
