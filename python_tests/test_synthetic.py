"""The families of points: what their numbers follow."""

from __future__ import annotations

import math

import pytest
import torch

from kfo_ext.tasks import Linear, Logistic, Sinusoid, TaskBatch


def joined(batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """All points of each task, in float64."""
    support, query = batch.to(dtype=torch.float64)
    return torch.cat([support.x, query.x], 1), torch.cat([support.y, query.y], 1)


def test_sinusoid_points_lie_on_one_wave():
    batch = Sinusoid("test", shots=10, queries=15).sample(0, 300).to(dtype=torch.float64)
    assert batch.support.x.shape == batch.support.y.shape == (300, 10, 1)
    assert batch.query.x.shape == batch.query.y.shape == (300, 15, 1)
    assert -5 <= batch.query.x.min() < -4.9 and 4.9 < batch.query.x.max() <= 5

    def waves(x):
        return torch.cat([x.sin(), x.cos()], -1)

    a, b = torch.linalg.lstsq(waves(batch.support.x), batch.support.y).solution.unbind(1)
    torch.testing.assert_close(waves(batch.query.x) @ torch.stack([a, b], 1), batch.query.y, atol=1e-5, rtol=1e-5)
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    assert 0.1 <= amplitude.min() < 0.3 and 4.8 < amplitude.max() <= 5 + 1e-6
    assert -1e-5 <= phase.min() < 0.1 and math.pi - 0.1 < phase.max() <= math.pi + 1e-5


def test_linear_targets_are_a_line_and_noise():
    x, y = joined(Linear("train", shots=30, queries=70, noise=0.5).sample(0, 2000))
    assert x.shape == y.shape == (2000, 100, 1)
    theta = (x * y).sum(1) / x.square().sum(1)
    # The error of a fitted slope has the variance noise^2 / sum(x^2), about 0.0025 here.
    assert abs(theta.mean()) < 4 / math.sqrt(2000) and abs(theta.var() - 1.0025) < 4 * math.sqrt(2 / 2000)
    residual = y - theta.unsqueeze(1) * x
    assert abs(residual.square().mean() - 0.25 * 99 / 100) < 4 * 0.25 * math.sqrt(2 / 200_000)
    assert abs(x.mean()) < 4 / math.sqrt(200_000) and abs(x.var() - 1) < 4 * math.sqrt(2 / 200_000)
    assert abs((residual * x).mean()) < 0.01


def test_linear_without_noise_is_a_line():
    x, y = joined(Linear("test", noise=0.0).sample(0, 50))
    slopes = y / x
    torch.testing.assert_close(slopes, slopes[:, :1].expand_as(slopes), rtol=1e-5, atol=1e-5)


def test_noise_does_not_move_the_points():
    a, b = (Linear("train", noise=noise).sample(1, 3) for noise in (0.0, 2.0))
    assert torch.equal(a.support.x, b.support.x) and not torch.equal(a.support.y, b.support.y)


@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_separable_labels_have_a_linear_boundary_through_zero(dimension):
    x, y = joined(Logistic("train", dimension=dimension, shots=40, queries=60).sample(0, 200))
    assert x.shape == (200, 100, dimension) and y.shape == (200, 100, 1)
    assert abs(y.mean() - 0.5) < 0.05
    # The perceptron ends only where a boundary without a constant exists.
    sign, theta = 2 * y - 1, torch.zeros(200, dimension, 1, dtype=torch.float64)
    for _ in range(20_000):
        wrong = (sign * (x @ theta) <= 0).squeeze(-1)
        if not wrong.any():
            break
        first = wrong.int().argmax(1)
        step = (sign * x)[torch.arange(200), first].unsqueeze(-1)
        theta += step * wrong.any(1)[:, None, None]
    assert not wrong.any()


def test_bernoulli_labels_follow_the_sigmoid():
    counts = {"shots": 200, "queries": 200}
    x, y = joined(Logistic("train", labels="bernoulli", **counts).sample(0, 400))
    hard_x, hard_y = joined(Logistic("train", **counts).sample(0, 400))
    assert torch.equal(x, hard_x)
    agreement = (y == hard_y).double().mean()
    # E max(sigma, 1 - sigma) in two dimensions, the accuracy of the best classifier.
    assert abs(agreement - 0.693) < 0.02
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_bernoulli_labels_of_a_known_theta():
    family = Logistic("train", dimension=1, labels="bernoulli", shots=2000, queries=2000)
    x, y = joined(family.sample(0, 20))
    theta = torch.zeros(20, 1, 1, dtype=torch.float64)
    # Newton's method on the likelihood.
    for _ in range(25):
        p = (x * theta).sigmoid()
        theta += (x * (y - p)).sum(1, keepdim=True) / (x.square() * p * (1 - p)).sum(1, keepdim=True)
    generator = family._points.generator(0, 20)
    drawn = torch.randn(20, 1, 1, generator=generator, dtype=torch.float32)
    assert (theta - drawn).abs().max() < 0.25


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear("train", noise=-1), ValueError, "noise: expected a finite number of at least 0, got -1"),
        (lambda: Linear("train", noise="1"), TypeError, "noise: expected a number, got '1'"),
        (lambda: Logistic("train", dimension=0), ValueError, "dimension: expected at least 1, got 0"),
        (lambda: Logistic("train", labels="soft"), ValueError, "labels: expected one of separable, bernoulli"),
        (lambda: Logistic("valid"), ValueError, "split: expected one of train, validation, test, got 'valid'"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
