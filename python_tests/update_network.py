"""A network with the parameters of `update_table`, and a batch of tasks for it."""

from __future__ import annotations

import torch
from torch import nn
from update_table import SHAPES

from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 2


class Head(nn.ModuleList):
    def forward(self, x):
        return self[0](x) + self[1](x)


class Net(nn.Module):
    """Its parameters are those of `SHAPES`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wave = nn.Conv2d(3, 4, (2, 3)), nn.Conv1d(2, 3, 3, bias=False)
        self.volume, self.body = nn.Conv3d(3, 2, (2, 1, 2), bias=False), nn.Linear(7, 5)
        self.head = Head([nn.Linear(5, WAYS, bias=False), nn.Linear(5, WAYS)])

    def features(self, x):
        x = self.conv(x).tanh()
        wave = self.wave(x.reshape(len(x), 2, 8)).tanh()
        volume = self.volume(wave.reshape(len(x), 3, 2, 1, 3)).tanh()
        return self.body(torch.cat([volume.flatten(1), wave[:, :, 0]], 1)).tanh()

    def forward(self, x):
        return self.head(self.features(x))


def network() -> Net:
    model = Net().double()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == SHAPES
    return model


def batch() -> TaskBatch:
    def examples(count: int) -> Examples:
        x = torch.randn(TASKS, count, 3, 3, 4, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count)))

    return TaskBatch(examples(5), examples(4))
