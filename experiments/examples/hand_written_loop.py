"""A MAML loop written by hand in plain torch, with a KFO whose factors are adapted to each task by `kfo.step`.

python experiments/examples/hand_written_loop.py [meta-iterations]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kfo_ext import KFO
from kfo_ext.tasks import Glyphs, TaskBatch

LR, STEPS, TASKS = 0.1, 3, 4


def block(channels: int, hidden: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, hidden, 3, stride=2, padding=1)
    return [convolution, nn.BatchNorm2d(hidden, track_running_stats=False), nn.ReLU()]


def query_outputs(model: nn.Module, kfo: KFO, tasks: TaskBatch, first_order: bool = False) -> Tensor:
    """The outputs (tasks, n, ways) of the query examples, after each task's own steps on its support examples."""
    outputs = []
    for x, y, query in zip(*tasks.support, tasks.query.x):
        params: dict[str, Tensor] = dict(model.named_parameters())
        state = None
        for _ in range(STEPS):
            loss = cross_entropy(functional_call(model, params, (x,)), y)
            params, state = kfo.step(loss, params, state, lr=LR, adapt_update=True, first_order=first_order)
        outputs.append(functional_call(model, params, (query,)))
    return torch.stack(outputs)


def accuracy(model: nn.Module, kfo: KFO, tasks: TaskBatch) -> float:
    # Nothing is learned from these tasks: without second derivatives they take less time.
    outputs = query_outputs(model, kfo, tasks, first_order=True)
    return (outputs.argmax(-1) == tasks.query.y).double().mean().item()


def main(iterations: int = 60) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*block(1, 16), *block(16, 16), *block(16, 16), nn.Flatten(), nn.LazyLinear(5))
    train, unseen = Glyphs("train"), Glyphs("test").sample(0, tasks=50)
    model(unseen.support.x[0])  # gives the lazy layer its size
    kfo = KFO(model.named_parameters())
    outer = torch.optim.Adam([*model.parameters(), *kfo.parameters()], lr=0.003)
    print(f"before: accuracy on unseen characters {accuracy(model, kfo, unseen):.3f}")
    for number in range(iterations):
        tasks = train.sample(number, TASKS)
        loss = cross_entropy(query_outputs(model, kfo, tasks).flatten(0, 1), tasks.query.y.flatten())
        outer.zero_grad()
        loss.backward()  # by the network, and by every R and L that its tasks began with
        outer.step()
    print(f"after {iterations} meta-iterations: {accuracy(model, kfo, unseen):.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
