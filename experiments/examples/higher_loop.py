"""MAML with higher's inner loop, and a KFO as the `grad_callback` of its differentiable SGD.

python experiments/examples/higher_loop.py [meta-iterations]        needs higher
"""

from __future__ import annotations

import sys

import higher
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kfo_ext import KFO
from kfo_ext.tasks import Glyphs, TaskBatch

LR, STEPS, TASKS = 0.1, 3, 4


def network() -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        return [convolution, nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU()]

    return nn.Sequential(*block(1), *block(16), *block(16), nn.Flatten(), nn.Linear(16 * 4 * 4, 5))


def query_outputs(model: nn.Module, kfo: KFO, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """The outputs (n, ways) of a task's query examples, after its steps on the support examples."""
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (learner, inner):
        for _ in range(STEPS):
            # The one line: without grad_callback it is plain MAML.
            inner.step(cross_entropy(learner(x), y), grad_callback=kfo.transform)
        outputs: Tensor = learner(query)
    return outputs


def accuracy(model: nn.Module, kfo: KFO, tasks: TaskBatch) -> float:
    rows = zip(*tasks.support, *tasks.query)
    hits = [(query_outputs(model, kfo, x, y, query).argmax(-1) == target).double() for x, y, query, target in rows]
    return torch.stack(hits).mean().item()


def main(iterations: int = 60) -> None:
    torch.manual_seed(0)
    model = network()
    kfo = KFO(model.named_parameters())
    outer = torch.optim.Adam([*model.parameters(), *kfo.parameters()], lr=0.003)
    train, unseen = Glyphs("train"), Glyphs("test").sample(0, tasks=20)
    print(f"before: accuracy on unseen characters {accuracy(model, kfo, unseen):.3f}")
    for number in range(iterations):
        tasks = train.sample(number, TASKS)
        outer.zero_grad()
        for x, y, query, target in zip(*tasks.support, *tasks.query):
            loss = cross_entropy(query_outputs(model, kfo, x, y, query), target) / TASKS
            loss.backward()  # by the network, and by every R and L
        outer.step()
    print(f"after {iterations} meta-iterations: {accuracy(model, kfo, unseen):.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
