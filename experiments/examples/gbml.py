"""A loop written for learn2learn's GBML that runs on the GBML of kfo_ext: one line of imports differs.

python experiments/examples/gbml.py [meta-iterations]        needs no learn2learn
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# from learn2learn.algorithms import GBML; KroneckerTransform and KroneckerLinear from learn2learn.optim and .nn
from kfo_ext.interop.learn2learn import GBML, KroneckerLinear, KroneckerTransform
from kfo_ext.tasks import Glyphs, TaskBatch

LR, STEPS, TASKS = 0.1, 3, 4


def network() -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        return [convolution, nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU()]

    return nn.Sequential(*block(1), *block(16), *block(16), nn.Flatten(), nn.Linear(16 * 4 * 4, 5))


def query_outputs(gbml: GBML, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """The outputs (n, ways) of a task's query examples, after its steps on the support examples."""
    learner = gbml.clone()
    for _ in range(STEPS):
        learner.adapt(cross_entropy(learner(x), y))
    outputs: Tensor = learner(query)
    return outputs


def accuracy(gbml: GBML, tasks: TaskBatch) -> float:
    rows = zip(*tasks.support, *tasks.query)
    hits = [(query_outputs(gbml, x, y, query).argmax(-1) == target).double() for x, y, query, target in rows]
    return torch.stack(hits).mean().item()


def main(iterations: int = 60) -> None:
    torch.manual_seed(0)
    gbml = GBML(network(), transform=KroneckerTransform(KroneckerLinear), lr=LR, adapt_transform=True)
    outer = torch.optim.Adam(gbml.parameters(), lr=0.003)
    train, unseen = Glyphs("train"), Glyphs("test").sample(0, tasks=20)
    print(f"before: accuracy on unseen characters {accuracy(gbml, unseen):.3f}")
    for number in range(iterations):
        tasks = train.sample(number, TASKS)
        outer.zero_grad()
        for x, y, query, target in zip(*tasks.support, *tasks.query):
            loss = cross_entropy(query_outputs(gbml, x, y, query), target) / TASKS
            loss.backward()  # by the network, and by every R and L that its tasks began with
        outer.step()
    print(f"after {iterations} meta-iterations: {accuracy(gbml, unseen):.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
