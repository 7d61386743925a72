"""One meta-iteration, gradients of network and factors: ours against learn2learn's GBML with KroneckerTransform."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfo_ext import KFO, MAML
from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.tasks import Examples, TaskBatch

Gradients = list[Tensor]


class Ours:
    """`MAML(model, update=KFO, adapt_update=True)`, factors near the identity."""

    def __init__(self, model: nn.Module, batch: TaskBatch, *, lr: float, steps: int, psd: bool) -> None:
        self.kfo = KFO(model.named_parameters(), psd=psd).to(next(model.parameters()).dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for factor in (X for pair in self.kfo.factors() for X in pair):
                factor.add_(torch.randn(factor.shape, generator=generator), alpha=0.05)
        self.maml = MAML(model, update=self.kfo, lr=lr, steps=steps, adapt_update=True)
        self.model, self.batch = model, batch

    def run(self) -> Tensor:
        self.maml.zero_grad()
        result = self.maml(self.batch)
        result.loss.backward()
        return result.loss.detach()

    def gradients(self) -> Gradients:
        """Per parameter, then dR and dL per parameter."""
        factors = copy.deepcopy(self.kfo)
        with torch.no_grad():
            for into, parameter in zip(factors.parameters(), self.kfo.parameters(), strict=True):
                into.copy_(parameter.grad)
        return [p.grad for p in self.model.parameters()] + [X.detach() for pair in factors.factors() for X in pair]


class Learn2learn:
    """learn2learn's meta-training loop, from the same model and factors."""

    def __init__(self, model: nn.Module, ours: Ours, batch: TaskBatch, *, lr: float, steps: int, psd: bool) -> None:
        l2l = light_import()
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=psd)
        self.gbml = l2l.algorithms.GBML(model, transform=transform, lr=lr, adapt_transform=True)
        self.gbml.to(next(model.parameters()).dtype)
        kronecker_factors_to(self.gbml.compute_update, ours.kfo.factors())
        self.batch, self.steps = batch, steps

    def run(self) -> Tensor:
        self.gbml.zero_grad()
        tasks, total = len(self.batch.support.x), 0.0
        for x, y, query_x, query_y in zip(*self.batch.support, *self.batch.query, strict=True):
            learner = self.gbml.clone()
            for _ in range(self.steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            loss = F.cross_entropy(learner(query_x), query_y) / tasks
            loss.backward()
            total += loss.detach()
        return total

    def gradients(self) -> Gradients:
        """Per parameter, then dR and dL per parameter."""
        layers = [module.transform for module in self.gbml.compute_update.transforms_modules]
        pairs = [kronecker_factors(layer.left.grad, layer.right.grad, psd=layer.psd) for layer in layers]
        return [p.grad for p in self.gbml.module.parameters()] + [X for pair in pairs for X in pair]


def contenders(
    make_model: Callable[[], nn.Module],
    batch: TaskBatch,
    dtype: torch.dtype,
    *,
    lr: float,
    steps: int,
    psd: bool = True,
) -> tuple[Ours, Learn2learn]:
    """Both ways over the same model, factors and tasks."""
    torch.manual_seed(0)
    model = make_model().to(dtype)
    batch = TaskBatch(*(Examples(part.x.to(dtype), part.y) for part in batch))
    ours = Ours(copy.deepcopy(model), batch, lr=lr, steps=steps, psd=psd)
    return ours, Learn2learn(model, ours, batch, lr=lr, steps=steps, psd=psd)


def verify(make_model: Callable[[], nn.Module], batch: TaskBatch, **settings) -> dict[str, float]:
    """Compare loss and meta-gradients of one meta-iteration: in float64 to 1e-10, in float32 roughly.

    Returns: of each contender in float32, the error of all meta-gradients together, relative to float64

    Raises:
        AssertionError: they differ.
    """
    ours, theirs = contenders(make_model, batch, torch.float64, **settings)
    torch.testing.assert_close(ours.run(), theirs.run(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours.gradients(), theirs.gradients(), atol=1e-10, rtol=1e-10)

    truth = _flat(theirs.gradients())
    if not truth.isfinite().all():
        raise AssertionError("the meta-gradients are not finite: choose a smaller lr")
    errors = {}
    for name, contender in zip(
        ("kfo", "learn2learn"), contenders(make_model, batch, torch.float32, **settings), strict=True
    ):
        contender.run()
        errors[name] = ((_flat(contender.gradients()) - truth).norm() / truth.norm()).item()
    # Rounding takes some ReLU to the other side of its kink, here or there by chance: float32 errs by 1e-5 or by 1e-2.
    if not max(errors.values()) <= 0.1:
        raise AssertionError(f"float32 meta-gradients: errors relative to float64 {errors}")
    return errors


def _flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.double().reshape(-1) for gradient in gradients])
