"""Losses and accuracies per task: whatever torch computes for that task alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from plain_maml import assert_equal_truth, plain_maml
from torch import nn
from torch.nn import functional as F

from kfo_ext import ANIL, MAML
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch

CLASSES, TASKS, COUNT = 3, 3, 6
OPTIONS = {"lr": 0.3, "steps": 2}
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES = {
    "default": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "ignored class": nn.CrossEntropyLoss(ignore_index=1),
    "weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothing": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "partial": partial(F.cross_entropy, ignore_index=2, label_smoothing=0.1),
    "own": lambda output, target: F.nll_loss(output.log_softmax(1), target, ignore_index=-100) * 2,
}


class Backbone(nn.Module):
    """A user's own network with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(81, 5), nn.Tanh()), nn.Linear(5, CLASSES)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def learner_of(kind: str, **options):
    cnn = {"in_channels": 1, "hidden": 4, "ways": CLASSES, "image_size": 9, "stride": 2}
    if kind == "linear":
        return MAML(nn.Linear(81, CLASSES).double(), **options)
    model = (Backbone() if kind == "anil own" else CNN(2, **cnn)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return (MAML if kind == "maml cnn" else ANIL)(model, **options)


def batch_for(kind: str) -> TaskBatch:
    def examples() -> Examples:
        x = torch.randn(TASKS, COUNT, *((81,) if kind == "linear" else (1, 9, 9)), dtype=torch.float64)
        y = torch.randint(0, CLASSES, (TASKS, COUNT))
        # A class besides those that a loss ignores.
        y[:, :2] = torch.tensor([0, 1])
        return Examples(x, y)

    return TaskBatch(examples(), examples())


@pytest.mark.parametrize("route", ["auto", "loop"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["linear", "maml cnn", "anil cnn", "anil own"])
def test_each_loss_is_that_of_torch_for_each_task(kind, loss, route):
    batch = batch_for(kind)
    if loss in ("default", "module", "own"):
        for part in batch:
            part.y[0, 3:], part.y[1, 5] = -100, -100
    learner = learner_of(kind, loss=LOSSES[loss], route=route, **OPTIONS)
    truth = plain_maml(learner.model, batch, LOSSES[loss], head=isinstance(learner, ANIL), **OPTIONS)
    assert_equal_truth(learner, batch, truth)
    ignored = {"ignored class": 1, "partial": 2}.get(loss, -100)
    expected = [
        (output.argmax(1) == y)[y != ignored].double().mean() for output, y in zip(truth.outputs, batch.query.y)
    ]
    torch.testing.assert_close(learner(batch).metrics.double(), torch.stack(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("route", ["auto", "loop"])
def test_a_task_whose_labels_are_all_ignored_has_no_loss(route):
    batch = batch_for("linear")
    batch.query.y[1] = -100
    result = learner_of("linear", route=route, **OPTIONS)(batch)
    assert result.query_losses.isnan().tolist() == [False, True, False]
    assert result.metrics.isnan().tolist() == [False, True, False]


class Shaped(nn.Module):
    """A linear map whose output is given another form."""

    def __init__(self, width: int, form) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, width), form

    def forward(self, x):
        return self.form(self.linear(x))


class Answer:
    def __init__(self, logits) -> None:
        self.logits = logits


def ints(high: int, *shape: int):
    return torch.randint(0, high, (TASKS, COUNT, *shape))


def squares(output, target):
    return (output - target).square().mean()


SQUARE = (2, 2)
# name: (width, form of the output, loss, targets)
WITHOUT_CLASSES = {
    "one logit": (1, lambda x: x, lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.double()), ints(2)),
    "flat logit": (1, lambda x: x[:, 0], lambda o, y: F.binary_cross_entropy_with_logits(o, y.double()), ints(2)),
    "counts": (1, lambda x: x[:, 0], lambda o, y: F.poisson_nll_loss(o, y.double()), ints(9)),
    "several labels": (3, lambda x: x, lambda o, y: F.binary_cross_entropy_with_logits(o, y.double()), ints(2, 3)),
    "tuple": (3, lambda x: (x, x.sum()), lambda o, y: F.cross_entropy(o[0], y), ints(3)),
    "object": (3, Answer, lambda o, y: F.cross_entropy(o.logits, y), ints(3)),
    "dict": (3, lambda x: {"logits": x}, lambda o, y: F.cross_entropy(o["logits"], y), ints(3)),
    "yes or no": (3, lambda x: x, lambda o, y: squares(o[:, 0], y.double()), ints(2).bool()),
    "complex": (4, torch.fft.rfft, lambda o, y: squares(o.abs()[:, 0], y), ints(2)),
    "segmentation by last": (
        12,
        lambda x: x.view(-1, 2, 2, 3),
        lambda o, y: F.cross_entropy(o.permute(0, 3, 1, 2), y),
        ints(3, 2, 2),
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_CLASSES)
def test_no_accuracy_without_classes(kind):
    width, form, loss, targets = WITHOUT_CLASSES[kind]
    model = Shaped(width, form).double()
    x = torch.randn(TASKS, COUNT, 4, dtype=torch.float64)
    batch = TaskBatch(Examples(x, targets), Examples(x + 1, targets))
    learner = MAML(model, loss=loss, **OPTIONS)
    assert learner(batch).metrics is None
    assert_equal_truth(learner, batch, plain_maml(model, batch, loss, **OPTIONS))


@pytest.mark.parametrize("size", [(2,), (2, 3)], ids=["sequence", "segmentation"])
def test_classes_are_in_dimension_one(size):
    model = Shaped(3 * torch.Size(size).numel(), lambda x: x.view(-1, 3, *size)).double()
    x, y = torch.randn(TASKS, COUNT, 4, dtype=torch.float64), ints(3, *size)
    y[0, 0] = -100
    batch = TaskBatch(Examples(x, y), Examples(x + 1, y))
    learner = MAML(model, **OPTIONS)
    truth = plain_maml(model, batch, F.cross_entropy, **OPTIONS)
    assert_equal_truth(learner, batch, truth)
    expected = [(output.argmax(1) == t)[t != -100].double().mean() for output, t in zip(truth.outputs, y)]
    torch.testing.assert_close(learner(batch).metrics.double(), torch.stack(expected), rtol=0, atol=1e-7)


def test_a_target_that_is_no_class_leaves_no_accuracy():
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(TASKS, COUNT, 4, dtype=torch.float64), ints(2)
    y[1, 2] = 7
    batch = TaskBatch(Examples(x, y), Examples(x, y))
    for route in ("auto", "loop"):
        learner = MAML(model, loss=lambda o, y: squares(o[:, 0], y), route=route, **OPTIONS)
        assert learner(batch).metrics.isnan().tolist() == [False, True, False]


def test_logits_that_are_not_a_number_leave_no_accuracy():
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(TASKS, COUNT, 4, dtype=torch.float64), ints(3)
    query = x.clone()
    query[1, 2], query[2, 2] = torch.nan, torch.nan
    counted = y.clone()
    counted[2, 2] = -100
    for route in ("auto", "loop"):
        metrics = MAML(model, route=route, **OPTIONS)(TaskBatch(Examples(x, y), Examples(query, counted))).metrics
        assert metrics.isnan().tolist() == [False, True, False]


def test_bfloat16_outputs_of_any_form():
    model = Shaped(3, lambda x: (x, {"sum": x.sum()}, x.argmax(1)))
    x = torch.randn(TASKS, COUNT, 4)
    batch = TaskBatch(Examples(x, ints(3)), Examples(x, ints(3)))
    seen = []

    def loss(output, y):
        seen.append([output[0].dtype, output[1]["sum"].dtype, output[2].dtype])
        return F.cross_entropy(output[0], y)

    assert MAML(model, loss=loss, bf16=True, **OPTIONS)(batch).loss.isfinite()
    assert seen[0] == [torch.float32, torch.float32, torch.int64]


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_classes_in_uint8_equal_those_in_int64(loss):
    # In uint8, -100, the target that cross-entropy ignores, would be class 156.
    model, x = nn.Linear(4, 160).double(), torch.randn(TASKS, COUNT, 4, dtype=torch.float64)
    y = torch.full((TASKS, COUNT), 156).index_fill(1, torch.tensor([0]), 3)
    maml = MAML(model, loss=loss, **OPTIONS)
    expected, result = (maml(TaskBatch(*[Examples(x, y.to(dtype))] * 2)) for dtype in (torch.int64, torch.uint8))
    torch.testing.assert_close(result.query_losses, expected.query_losses)
    assert torch.equal(result.metrics, expected.metrics)


def test_a_loss_that_cannot_be_meant_is_refused():
    x = torch.randn(TASKS, COUNT, 4)
    floats = TaskBatch(*[Examples(x, torch.randn(TASKS, COUNT, 1))] * 2)
    with pytest.raises(
        ValueError,
        match=r"loss: expected integer targets for the default cross-entropy, .*, got torch\.float32",
    ):
        MAML(nn.Linear(4, 1), **OPTIONS)(floats)
    for dtype in (torch.int32, torch.bool):
        with pytest.raises(ValueError, match=rf"got {dtype}; y\.long\(\) converts them"):
            MAML(nn.Linear(4, 3), **OPTIONS)(TaskBatch(*[Examples(x, ints(2).to(dtype))] * 2))
    for route in ("auto", "loop"):
        with pytest.raises(ValueError, match="loss: cross-entropy over a single class is 0 for any output"):
            MAML(nn.Linear(4, 1), route=route, **OPTIONS)(TaskBatch(*[Examples(x, ints(1))] * 2))
        with pytest.raises(
            ValueError, match=r"loss: cross-entropy .* Target 3 is out .* one output per class \(ways\)"
        ):
            MAML(nn.Linear(4, 3), route=route, **OPTIONS)(TaskBatch(*[Examples(x, ints(1) + 3)] * 2))
    with pytest.raises(TypeError, match="loss: expected a scalar tensor per task, got float"):
        MAML(nn.Linear(4, 3), loss=lambda o, y: 1.0, **OPTIONS)(TaskBatch(*[Examples(x, ints(3))] * 2))
    for route in ("auto", "loop"):
        with pytest.raises(ValueError, match="loss: does not depend on any parameter"):
            MAML(nn.Linear(4, 3), loss=lambda o, y: o.detach().sum(), route=route, **OPTIONS)(
                TaskBatch(*[Examples(x, ints(3))] * 2)
            )


def right(output, target):
    return (output.argmax(1) == target).sum()


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("kind", ["linear", "anil own"])
def test_a_metric_of_ones_own(kind, route):
    batch = batch_for(kind)
    learner = learner_of(kind, metric=right, route=route, **OPTIONS)
    truth = plain_maml(learner.model, batch, F.cross_entropy, head=isinstance(learner, ANIL), **OPTIONS)
    assert_equal_truth(learner, batch, truth)
    metrics = learner(batch).metrics
    assert metrics.tolist() == [right(*pair).item() for pair in zip(truth.outputs, batch.query.y)]
    assert metrics.dtype == torch.float64 and not metrics.requires_grad
    # A number of Python, and a tensor that would have a graph.
    for metric in (lambda o, y: right(o, y).item(), lambda o, y: o.sum() * 0 + right(o, y)):
        learner.metric = metric
        result = learner(batch)
        assert torch.equal(result.metrics, metrics) and not result.metrics.requires_grad
        with torch.no_grad():
            assert torch.equal(learner(batch).metrics, metrics)


@pytest.mark.parametrize("kind", ["tuple", "object", "dict", "one logit"])
def test_a_metric_takes_the_outputs_that_the_loss_takes(kind):
    width, form, loss, targets = WITHOUT_CLASSES[kind]
    model = Shaped(width, form).double()
    x = torch.randn(TASKS, COUNT, 4, dtype=torch.float64)
    batch = TaskBatch(Examples(x, targets), Examples(x + 1, targets))
    learner = MAML(model, loss=loss, metric=lambda o, y: loss(o, y).item(), **OPTIONS)
    result = learner(batch)
    torch.testing.assert_close(result.metrics, result.query_losses)
    # Of groups of tasks too.
    parts = [learner(part).metrics for part in batch.split(1)]
    torch.testing.assert_close(torch.cat(parts), result.metrics)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (
            lambda o, y: o.argmax(1) == y,
            TypeError,
            r"metric: expected a number or a tensor of shape \(\) .* torch.bool",
        ),
        (lambda o, y: None, TypeError, "metric: expected a number .* per task, got NoneType"),
        (lambda o, y: "good", TypeError, "metric: expected a number .* per task, got str"),
        (lambda o, y: 1j, TypeError, "metric: expected a number .* per task, got complex"),
        (lambda o, y: o.sum().to(torch.complex64), TypeError, "metric: .* got torch.complex64 of shape"),
        (lambda o, y: o["logits"], RuntimeError, "metric: raised IndexError: "),
    ],
)
def test_a_metric_that_is_no_number_is_named(metric, error, message):
    batch = batch_for("linear")
    with pytest.raises(error, match=message):
        learner_of("linear", metric=metric, **OPTIONS)(batch)


def test_a_metric_that_cannot_be_called_is_refused():
    for wrong in ("accuracy", nn.CrossEntropyLoss):
        with pytest.raises(TypeError, match=r"metric: expected a function of \(output, target\) or None, got"):
            MAML(nn.Linear(4, 3), metric=wrong, **OPTIONS)


def test_an_error_of_the_metric_is_not_blamed_on_the_batch():
    class Converting(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    x = torch.randn(TASKS, COUNT, 4, dtype=torch.float64)
    batch = TaskBatch(*[Examples(x, ints(3))] * 2)
    with pytest.raises(RuntimeError, match="metric: raised KeyError: 'mine'"):
        MAML(Converting(4, 3), metric=lambda o, y: {}["mine"], **OPTIONS)(batch)
