"""Test-time adaptation: a meta-trained network adapts to a new task, and the adapted network is saved and loaded.

python experiments/examples/adapt_and_save.py [meta-iterations]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kfo_ext import KFO, MAML
from kfo_ext.networks import omniglot_cnn
from kfo_ext.tasks import Glyphs


def main(iterations: int = 50) -> None:
    torch.manual_seed(0)
    model = omniglot_cnn(layers=2)
    maml = MAML(model, update=KFO(model.named_parameters()), lr=0.4, steps=3, adapt_update=True)
    outer = torch.optim.Adam(maml.parameters(), lr=0.003)
    train = Glyphs("train")
    for number in range(iterations):
        outer.zero_grad()
        maml(train.sample(number, tasks=4)).loss.backward()
        outer.step()

    # A new task: 25 labelled images of 5 unseen characters, adapted to by more steps than in training.
    task = Glyphs("test").sample(0, tasks=1)
    (x, y), (query, labels) = ((part.x[0], part.y[0]) for part in task)
    with torch.no_grad():
        adapted = maml.adapt((x, y), steps=10)
        predicted = adapted.predict(query)
    print(f"support loss {adapted.losses[0]:.3f} before the first step, {adapted.losses[-1]:.3f} before the last")
    print(f"accuracy on the new task: {(predicted.argmax(-1) == labels).double().mean():.3f}")

    # The adapted network is a plain module. It stays in training mode: its batch norms normalise by each batch.
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapted.pt"
        torch.save(adapted.module().state_dict(), path)
        loaded = omniglot_cnn(layers=2)
        loaded.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        difference = (loaded(query) - predicted).abs().max().item()
    print(f"outputs of the saved and loaded network differ by {difference:.1g}")
    assert difference < 1e-4


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
