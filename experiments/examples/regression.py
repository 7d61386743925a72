"""Regression: sine waves from ten points each, with a loss of your own choice and a learned rate for each weight.

python experiments/examples/regression.py [meta-iterations]
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import mse_loss

from kfo_ext import MAML, MetaSGD
from kfo_ext.networks import sinusoid_mlp
from kfo_ext.tasks import Sinusoid


def main(iterations: int = 500) -> None:
    torch.manual_seed(0)
    model = sinusoid_mlp()
    maml = MAML(model, update=MetaSGD(model.named_parameters()), lr=0.01, steps=3, loss=mse_loss)
    outer = torch.optim.Adam(maml.parameters(), lr=0.002)
    train, unseen = Sinusoid("train"), Sinusoid("test").sample(0, tasks=200)

    def errors() -> str:
        with torch.no_grad():
            return ", ".join(f"{maml(unseen, steps=steps).query_losses.mean():.3f}" for steps in (0, 3, 10))

    print(f"squared error on unseen waves after 0, 3 and 10 steps, untrained: {errors()}")
    for number in range(iterations):
        outer.zero_grad()
        maml(train.sample(number, tasks=16)).loss.backward()
        outer.step()
    print(f"after {iterations} meta-iterations: {errors()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
