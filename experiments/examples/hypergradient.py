"""Hypergradient descent outside few-shot learning: a preconditioner that is learned while a regression is.

The inputs have very different scales, which slows gradient descent down. A KFO transforms the gradients, and Adam
learns its factors from the losses of the steps that follow. The sequence of steps never ends, so the graph is cut
every `CUT` steps: memory stays the same.

    python experiments/examples/hypergradient.py [steps]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from kfo_ext import KFO, GradientDescent, Update

LR, CUT = 0.03, 5
SCALES = torch.logspace(0, -1.5, 8)


def losses_of(make: type[Update], steps: int) -> list[float]:
    """The loss of each step, which is taken on examples that no step has seen before."""
    torch.manual_seed(0)
    target, model = torch.randn(8, 4) / SCALES[:, None], nn.Linear(8, 4)
    update = make(model.named_parameters())
    hyper = torch.optim.Adam(update.parameters(), lr=0.02) if update.phi else None
    params: dict[str, Tensor] = dict(model.named_parameters())
    state = None
    found: list[float] = []
    since_cut: list[Tensor] = []
    for number in range(1, steps + 1):
        x = torch.randn(64, 8) * SCALES
        loss = mse_loss(functional_call(model, params, (x,)), x @ target)
        params, state = update.step(loss, params, state, lr=LR)
        found.append(loss.item())
        since_cut.append(loss)
        if number % CUT == 0:
            if hyper is not None:
                hyper.zero_grad()
                torch.stack(since_cut).mean().backward()
                hyper.step()
            params, state = state.detached(params)
            since_cut = []
    return found


def main(steps: int = 1000) -> None:
    for name, make in (("gradient descent", GradientDescent), ("learned preconditioner", KFO)):
        losses = losses_of(make, steps)
        last = losses[-max(1, steps // 10) :]
        print(f"{name}: loss {losses[0]:.3f} at first, {sum(last) / len(last):.2g} in the last tenth of {steps} steps")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
