"""A captured meta-iteration with an optimizer for part of the learner, in groups: as an eager one, without a wait."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfo_ext import MAML
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import MetaStep

pytestmark = pytest.mark.gpu

RATES = [0.01, 0.003, 0.02]


def make_step(device: torch.device, graph: bool) -> MetaStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().to(device)
    learner = MAML(model, lr=0.1, steps=2, loss=nn.functional.mse_loss)
    # As their kernels read it: float32 on CUDA.
    kind = torch.float32 if device.type == "cuda" else torch.float64
    groups = [([model[2].weight], 0.5), ([model[0].bias], 0.125), ([model[2].bias], 0.0)]
    groups = [{"params": each, "lr": torch.tensor(rate, dtype=kind, device=device)} for each, rate in groups]
    adam = torch.optim.Adam(groups, fused=True)
    if not graph:
        return MetaStep(learner, adam, clip_norm=0.1)
    owned = nn.ParameterList([p for group in groups for p in group["params"]])
    recorder = None if device.type == "cuda" else EagerRecorder(owned)
    return CapturedMetaStep(learner, adam, clip_norm=0.1, recorder=recorder)


def make_batch(seed: int, device: torch.device) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(2, 5, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return TaskBatch(*(Examples(draw(3), draw(2)) for _ in range(2))).to(device)


def test_groups_keep_their_ratios_in_a_graph(device):
    graph, eager = make_step(device, True), make_step(device, False)
    start = {name: p.detach().clone() for name, p in graph.learner.named_parameters()}
    for number, rate in enumerate(RATES):
        batch = make_batch(number, device)
        reports = [step(batch, rate).on_host() for step in (graph, eager)]
        torch.testing.assert_close(reports[0].gradient_norm, reports[1].gradient_norm, rtol=1e-10, atol=0)
        rates = [group["lr"].item() for group in graph.optimizer.param_groups]
        assert rates == pytest.approx([rate, rate / 4, 0.0], rel=1e-6)
    for (name, a), b in zip(graph.learner.named_parameters(), eager.learner.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        moved = name in ("model.2.weight", "model.0.bias")
        assert torch.equal(a, start[name]) != moved, name
    assert graph.learner.model[0].weight.grad is None
