"""The upper line of figure 3: the optimum of softmax regression, and what it is chosen by."""

from __future__ import annotations

import pytest
import torch

from experiments.ceiling import PENALTIES, accuracies, chosen_penalty, fitted
from kfo_ext.tasks import FewShot


def test_the_fit_is_the_optimum_of_the_penalised_loss():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 7, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (40,), generator=generator)
    weight, bias = (each.requires_grad_() for each in fitted(x, y, 0.05))
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + 0.05 / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6
    assert (weight.shape, bias.shape) == ((3, 7), (3,))


def classes(noise: float) -> FewShot:
    generator = torch.Generator().manual_seed(0)
    data = [torch.eye(6)[label] + noise * torch.randn(30, 6, generator=generator) for label in range(6)]
    return FewShot(data, ways=4, shots=20, queries=5)


def test_accuracies_of_each_task_by_hand():
    family = classes(0.8)
    for index, found in enumerate(accuracies(family, 3, 0.1)):
        support, query = family.sample(index, 1)
        weight, bias = fitted(support.x[0].double(), support.y[0], 0.1)
        right = sum((weight @ x.double() + bias).argmax().item() == y.item() for x, y in zip(query.x[0], query.y[0]))
        assert found == right / len(query.y[0])
    assert sum(accuracies(classes(0.05), 4, 0.01)) == 4
    means = [sum(accuracies(family, 4, penalty)) for penalty in PENALTIES]
    assert chosen_penalty(family, 4) == PENALTIES[means.index(max(means))]


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        accuracies(classes(0.1), 0, 0.1)
    with pytest.raises(ValueError, match="penalty: expected a number above 0, got 0"):
        accuracies(classes(0.1), 1, 0)
