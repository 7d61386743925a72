"""MAML with TorchOpt's differentiable optimizer, and a KFO chained before its SGD as a gradient transformation.

python experiments/examples/torchopt_loop.py [meta-iterations]        needs torchopt
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfo_ext import KFO, Update
from kfo_ext.tasks import Glyphs, TaskBatch

LR, STEPS, TASKS = 0.1, 3, 4


def transformation(update: Update, model: nn.Module) -> torchopt.base.GradientTransformation:
    """An update of the model as one of TorchOpt's transformations; its state is the order that TorchOpt chose."""

    def init(params: Any) -> Any:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return tuple(names[id(parameter)] for parameter in params)

    def step(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return tuple(update.transform(dict(zip(state, updates))).values()), state

    return torchopt.base.GradientTransformation(init, step)


def network() -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        return [convolution, nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU()]

    return nn.Sequential(*block(1), *block(16), *block(16), nn.Flatten(), nn.Linear(16 * 4 * 4, 5))


def query_outputs(model: nn.Module, kfo: KFO, tasks: TaskBatch) -> Tensor:
    """The outputs (tasks, n, ways) of the query examples, after each task's steps on its support examples."""
    # The one line: torchopt.MetaSGD(model, lr=LR) is plain MAML.
    inner = torchopt.MetaOptimizer(model, torchopt.chain(transformation(kfo, model), torchopt.sgd(LR)))
    start = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
    outputs = []
    for x, y, query in zip(*tasks.support, tasks.query.x):
        for _ in range(STEPS):
            inner.step(cross_entropy(model(x), y))
        outputs.append(model(query))
        torchopt.recover_state_dict(model, start)
    return torch.stack(outputs)


def accuracy(model: nn.Module, kfo: KFO, tasks: TaskBatch) -> float:
    return (query_outputs(model, kfo, tasks).argmax(-1) == tasks.query.y).double().mean().item()


def main(iterations: int = 60) -> None:
    torch.manual_seed(0)
    model = network()
    kfo = KFO(model.named_parameters())
    outer = torch.optim.Adam([*model.parameters(), *kfo.parameters()], lr=0.003)
    train, unseen = Glyphs("train"), Glyphs("test").sample(0, tasks=20)
    print(f"before: accuracy on unseen characters {accuracy(model, kfo, unseen):.3f}")
    for number in range(iterations):
        tasks = train.sample(number, TASKS)
        loss = cross_entropy(query_outputs(model, kfo, tasks).flatten(0, 1), tasks.query.y.flatten())
        outer.zero_grad()
        loss.backward()  # by the network, and by every R and L
        outer.step()
    print(f"after {iterations} meta-iterations: {accuracy(model, kfo, unseen):.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
