"""MAML in the style of torch.func: `grad` for the inner steps, `vmap` over the tasks, and a KFO by `kfo.step`.

python experiments/examples/torch_func_loop.py [meta-iterations]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, linear

from kfo_ext import KFO
from kfo_ext.functional import batch_norm_relu, conv2d
from kfo_ext.tasks import Glyphs, TaskBatch

LR, STEPS, TASKS, BLOCKS, CHANNELS = 0.1, 3, 4, 3, 16


def start() -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    for block in range(BLOCKS):
        params[f"{block}.conv"] = nn.init.kaiming_normal_(torch.empty(CHANNELS, CHANNELS if block else 1, 3, 3))
        params[f"{block}.weight"], params[f"{block}.bias"] = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    params["head.weight"], params["head.bias"] = 0.05 * torch.randn(5, 4 * 4 * CHANNELS), torch.zeros(5)
    return {name: X.requires_grad_() for name, X in params.items()}


def outputs_of(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """(n, 5), of images (n, 1, height, width) of one task, by layers whose kernels compute all mapped tasks at once."""
    x = x.movedim(1, -1)  # channels last; [None] is the task dimension that the layers have
    for block in range(BLOCKS):
        x = conv2d(x[None], params[f"{block}.conv"][None], stride=2, padding=1)[0]
        rows = x.flatten(0, 2)[None]  # of all pixels
        x = batch_norm_relu(rows, params[f"{block}.weight"][None], params[f"{block}.bias"][None])[0].view(x.shape)
    return linear(x.flatten(1), params["head.weight"], params["head.bias"])


def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs_of(params, x), y)


def query_outputs(params: dict[str, Tensor], kfo: KFO, tasks: TaskBatch) -> Tensor:
    """The outputs (tasks, n, 5) of the query examples, after each task's own steps on its support examples."""

    def task(x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        adapted, state = params, None
        for _ in range(STEPS):
            grads = grad(loss_of)(adapted, x, y)
            adapted, state = kfo.step(grads, adapted, state, lr=LR, adapt_update=True)
        return outputs_of(adapted, query)

    return vmap(task)(*tasks.support, tasks.query.x)


def main(iterations: int = 60) -> None:
    torch.manual_seed(0)
    params = start()
    kfo = KFO(params.items())
    outer = torch.optim.Adam([*params.values(), *kfo.parameters()], lr=0.003)
    train, unseen = Glyphs("train"), Glyphs("test").sample(0, tasks=50)

    def accuracy() -> float:
        return (query_outputs(params, kfo, unseen).argmax(-1) == unseen.query.y).double().mean().item()

    print(f"before: accuracy on unseen characters {accuracy():.3f}")
    for number in range(iterations):
        tasks = train.sample(number, TASKS)
        outer.zero_grad()
        cross_entropy(query_outputs(params, kfo, tasks).flatten(0, 1), tasks.query.y.flatten()).backward()
        outer.step()
    print(f"after {iterations} meta-iterations: {accuracy():.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
