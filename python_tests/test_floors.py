"""experiments/floors.py: nearest class means against loops, of raw inputs and of features; training that resumes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import floors
from experiments.floors import evaluate_prototypical, nearest_centroid, prototypical_loss, train_prototypical
from kfo_ext.networks import CNN, omniglot_cnn
from kfo_ext.tasks import Examples, Glyphs, Sinusoid, TaskBatch
from kfo_ext.trainer.evaluation import Cancelled

WAYS, SIDE = 3, 6


class Uneven:
    """Tasks of classes of unequal sizes in mixed order, whose examples lie around a mean of their class."""

    def sample(self, index: int, tasks: int) -> TaskBatch:
        generator = torch.Generator().manual_seed(1000 * index + tasks)

        def examples(sizes: tuple[int, ...], means: Tensor) -> Examples:
            each = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
            y = torch.stack([each[torch.randperm(len(each), generator=generator)] for _ in range(tasks)])
            noise = torch.randn(tasks, len(each), 2, SIDE, SIDE, generator=generator, dtype=torch.float64)
            return Examples(torch.stack([mean[label] for mean, label in zip(means, y)]) + noise, y)

        means = 0.3 * torch.randn(tasks, WAYS, 2, SIDE, SIDE, generator=generator, dtype=torch.float64)
        return TaskBatch(examples((1, 4, 2), means), examples((3, 2, 5), means))


class Shown:
    """A family of one task."""

    def __init__(self, support: Examples, query: Examples) -> None:
        self.task = TaskBatch(support, query)

    def sample(self, index: int, tasks: int) -> TaskBatch:
        return self.task


def small_cnn() -> CNN:
    """Random in every parameter, in float64."""
    network = CNN(2, in_channels=2, hidden=4, ways=WAYS, image_size=SIDE, mean=False).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def nearest(support: Tensor, y: Tensor, query: Tensor) -> list[int]:
    """The class of the nearest mean, one query after the other."""
    means = [sum(x for x, label in zip(support, y) if label == k) / (y == k).sum() for k in range(WAYS)]
    return [min(range(WAYS), key=lambda k: ((x - means[k]) ** 2).sum().item()) for x in query]


def right(classes: list[int], y: Tensor) -> float:
    return sum(a == b for a, b in zip(classes, y.tolist(), strict=True)) / len(y)


def tasks_of(family: Any, count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    batches = [family.sample(index, 1) for index in range(count)]
    return [(each.support.x[0], each.support.y[0], each.query.x[0], each.query.y[0]) for each in batches]


def test_nearest_centroid_equals_a_loop():
    family = Uneven()
    expected = [right(nearest(sx.flatten(1), sy, qx.flatten(1)), qy) for sx, sy, qx, qy in tasks_of(family, 12)]
    found = nearest_centroid(family, 12)
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(found)) > 2
    assert 0.4 < sum(found) / len(found) < 1


def features_of_a_task(network: CNN, sx: Tensor, qx: Tensor) -> tuple[Tensor, Tensor]:
    support, query = network.features(torch.cat([sx, qx])).split([len(sx), len(qx)])
    return support, query


def test_evaluation_equals_a_loop():
    network, family = small_cnn(), Uneven()
    expected = []
    with torch.no_grad():
        for sx, sy, qx, qy in tasks_of(family, 8):
            support, query = features_of_a_task(network, sx, qx)
            expected.append(right(nearest(support, sy, query), qy))
    assert evaluate_prototypical(network, family, 8) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 2


def test_loss_and_gradients_equal_plain_torch():
    """Task by task: batch statistics of several tasks together would give others."""
    network, batch = small_cnn(), Uneven().sample(0, 4)
    losses = []
    for sx, sy, qx, qy in zip(*batch.support, *batch.query):
        support, query = features_of_a_task(network, sx, qx)
        means = [support[sy == k].mean(0) for k in range(WAYS)]
        for x, label in zip(query, qy):
            scores = torch.stack([-((x - mean) ** 2).sum() for mean in means])
            losses.append(scores.logsumexp(0) - scores[label])
    expected = torch.stack(losses).mean()
    loss = prototypical_loss(network, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    body = [parameter for name, parameter in network.named_parameters() if not name.startswith("head")]
    for ours, theirs in zip(torch.autograd.grad(loss, body), torch.autograd.grad(expected, body)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def trained(folder, iterations: int, *, start: int = 0, seed: int = 0, **options) -> tuple[CNN, dict[int, float]]:
    """A small run on glyphs.

    start: the seed of the network.
    seed: of the tasks.
    """
    torch.manual_seed(start)
    network = omniglot_cnn(2, hidden=16, init="zero_head")
    families = (Glyphs(split, shots=3, queries=3, seed=seed) for split in ("train", "validation"))
    settings = {"lr": 0.01, "batch": 4, "every": 5, "validation_tasks": 20, **options}
    return network, train_prototypical(network, *families, folder=folder, iterations=iterations, **settings)


def test_a_few_iterations_raise_accuracy_above_chance(tmp_path):
    test = Glyphs("test", shots=3, queries=3)
    torch.manual_seed(0)
    before = evaluate_prototypical(omniglot_cnn(2, hidden=16, init="zero_head"), test, 60)
    network, scores = trained(tmp_path, 40, batch=16, every=20)
    after = evaluate_prototypical(network, test, 60)
    assert list(scores) == [20, 40]
    assert sum(after) / 60 > max(0.45, sum(before) / 60 + 0.08)


def values(network: CNN) -> list[Tensor]:
    return list(network.state_dict().values())


@pytest.mark.parametrize("stopped", ["finished", "cancelled"])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, stopped):
    whole, scores = trained(tmp_path / "whole", 15)
    if stopped == "finished":
        trained(tmp_path / "parts", 5)
    else:
        answers = iter([False] * 7 + [True])
        with pytest.raises(Cancelled):
            trained(tmp_path / "parts", 15, cancelled=lambda: next(answers))
        # The state is of iteration 7, and training goes on from there.
        calls = []
        with pytest.raises(Cancelled):
            trained(tmp_path / "parts", 15, cancelled=lambda: calls.append(1) or len(calls) > 2)
    torch.rand(3)
    resumed, again = trained(tmp_path / "parts", 15)
    assert again == scores
    assert all(torch.equal(a, b) for a, b in zip(values(resumed), values(whole), strict=True))
    # A run that is done has the same to give, without an iteration.
    finished, same = trained(tmp_path / "parts", 15, cancelled=lambda: pytest.fail("an iteration"))
    assert same == scores
    assert all(torch.equal(a, b) for a, b in zip(values(finished), values(whole), strict=True))


def test_the_network_has_the_first_best_values_on_validation(tmp_path, monkeypatch):
    network, scores = trained(tmp_path / "real", 10)
    validation = Glyphs("validation", shots=3, queries=3)
    assert sum(evaluate_prototypical(network, validation, 20)) / 20 == max(scores.values())
    given = {5: 0.25, 10: 0.75, 15: 0.75, 20: 0.5}

    def stopped_at(folder: str, *stops: int) -> CNN:
        answers = iter(given.values())
        monkeypatch.setattr(floors, "evaluate_prototypical", lambda *_: [next(answers)])
        for stop in stops:
            network, found = trained(tmp_path / folder, stop)
            assert found == {at: score for at, score in given.items() if at <= stop}
        return network

    best = values(stopped_at("best", 10))
    for network in (stopped_at("whole", 20), stopped_at("parts", 5, 10, 15, 20)):
        assert all(torch.equal(a, b) for a, b in zip(values(network), best, strict=True))


def test_the_state_of_another_run_is_refused(tmp_path):
    trained(tmp_path, 5)
    for name, options in (
        ("start", {"start": 1}),
        ("family", {"seed": 1}),
        ("lr", {"lr": 0.02}),
        ("batch", {"batch": 5}),
        ("every", {"every": 1}),
        ("validation_tasks", {"validation_tasks": 21}),
    ):
        with pytest.raises(ValueError, match=rf"prototypical\.pt: expected a run with {name} = .*: use a new folder"):
            trained(tmp_path, 10, **options)
    trained(tmp_path, 10)
    with pytest.raises(ValueError, match=r"iterations: expected at least 10, where the run in .* is, got 5"):
        trained(tmp_path, 5)
    whole = (tmp_path / "prototypical.pt").read_bytes()
    (tmp_path / "prototypical.pt").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"prototypical\.pt: .*truncated or damaged"):
        trained(tmp_path, 10)


def test_what_diverges_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match=r"iteration \d+: the loss is (nan|inf)"):
        trained(tmp_path, 10, lr=1e30)
    network, family = small_cnn(), Uneven()
    network.blocks[0].conv.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="task 0 of the list"):
        evaluate_prototypical(network, family, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 7}, ValueError, "iterations: expected a multiple of every = 5, got 7"),
        ({"iterations": 0}, ValueError, "iterations: expected at least 1, got 0"),
        ({"batch": 0}, ValueError, "batch: expected at least 1"),
        ({"every": 2.0}, TypeError, "every: expected an int"),
        ({"validation_tasks": 0}, ValueError, "validation_tasks: expected at least 1"),
        ({"lr": math.inf}, ValueError, "lr: expected a finite number"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        trained(tmp_path, **{"iterations": 5, **options})
    assert not list(tmp_path.iterdir())


def test_bad_tasks_and_networks():
    x = torch.randn(1, 4, 2, SIDE, SIDE, dtype=torch.float64)

    def classes(*labels: int) -> Examples:
        return Examples(x[:, : len(labels)], torch.tensor([labels]))

    for support, query, message in (
        (classes(0, 0, 2), classes(0), "support.y: expected an example of each class, 0 to 2, in every task"),
        (classes(0, 1), classes(0, 2), "support.y: expected an example of each class, 0 to 2"),
        (classes(0, 1), classes(0, 10**12), "support.y: expected an example of each class"),
        (classes(0, -1), classes(0), "support.y: expected examples of classes 0 to ways - 1, got "),
        (classes(0, 1), Examples(x, x.flatten(2)), r"query.y: expected classes \(T, n\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_centroid(Shown(support, query), 1)
    with pytest.raises(ValueError, match=r"support\.y: expected classes"):
        nearest_centroid(Sinusoid("test"), 1)
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        nearest_centroid(Uneven(), 0)
    batch = Uneven().sample(0, 2)
    with pytest.raises(TypeError, match=r"network: expected a module with a method features\(x\), got Linear"):
        prototypical_loss(nn.Linear(2, 2), batch)
    network = small_cnn()
    network.blocks[1].norm = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="network: expected batch norm by batch statistics, got running statistics"):
        prototypical_loss(network, batch)
