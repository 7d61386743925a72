"""Outer optimizers and gradient accumulation: plain torch's numbers, harmless where not finite, captured or not."""

from __future__ import annotations

import math

import pytest
import torch
from meta_steps import RATES, assert_equal, learners, make_batch, make_learner, state_of
from plain_maml import plain_maml
from torch import nn
from torch.nn import functional as F

from kfo_ext import MAML
from kfo_ext.runs import checkpoint
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import MetaStep
from kfo_ext.trainer.optimizers import OPTIMIZERS

# Optimizer by name, and its options.
CASES = {
    "adam": ("adam", {"weight_decay": 0.0}),
    "adam-decay": ("adam", {"weight_decay": 0.2}),
    "adamw": ("adamw", {"weight_decay": 0.2}),
    "sgd": ("sgd", {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    "sgd-decay": ("sgd", {"momentum": 0.0, "nesterov": False, "weight_decay": 0.2}),
    "momentum": ("sgd", {"momentum": 0.8, "nesterov": False, "weight_decay": 0.2}),
    "nesterov": ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2}),
}
cases = pytest.mark.parametrize("case", CASES)
accumulations = pytest.mark.parametrize("count", [1, 3])


def make_step(case: str, learner: MAML, *, graph: bool = False, clip_norm: float = 0.0) -> MetaStep:
    name, options = CASES[case]
    rate = torch.tensor(1.0, dtype=torch.float64) if graph else 1.0
    optimizer = OPTIMIZERS[name].make([{"params": list(learner.parameters()), "lr": rate}], **options)
    if graph:
        return CapturedMetaStep(learner, optimizer, clip_norm=clip_norm, recorder=EagerRecorder(learner))
    return MetaStep(learner, optimizer, clip_norm=clip_norm)


def make_batches(number: int, count: int) -> list[TaskBatch]:
    """Of unequal numbers of tasks."""
    return [make_batch(10 * number + part, tasks=1 + part) for part in range(count)]


def joined(batches: list[TaskBatch]) -> TaskBatch:
    supports, queries = zip(*batches)
    return TaskBatch(*(Examples(*map(torch.cat, zip(*part))) for part in (supports, queries)))


class ByHand:
    """The equations of the optimizers, a parameter at a time."""

    def __init__(self, case: str, parameters: list[torch.Tensor]) -> None:
        self.name, self.options = CASES[case]
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self.count = 0

    def step(self, parameters, gradients, rate: float) -> None:
        self.count += 1
        decay = self.options["weight_decay"]
        for p, g, m, v in zip(parameters, gradients, self.first, self.second):
            if self.name == "adamw":
                p.mul_(1 - rate * decay)
            else:
                g = g + decay * p
            if self.name == "sgd":
                momentum = self.options["momentum"]
                m.mul_(momentum).add_(g)
                p.sub_(rate * (g + momentum * m if self.options["nesterov"] else m))
                continue
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            ahead = (v / (1 - 0.999**self.count)).sqrt() + 1e-8
            p.sub_(rate * m / (1 - 0.9**self.count) / ahead)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def small_batches(seed: int, count: int) -> list[TaskBatch]:
    """Of 1, 2, ... tasks."""
    generator = torch.Generator().manual_seed(seed)

    def examples(tasks: int) -> Examples:
        return Examples(*(torch.randn(tasks, 5, size, generator=generator).double() for size in (3, 2)))

    return [TaskBatch(examples(1 + part), examples(1 + part)) for part in range(count)]


@cases
@accumulations
@pytest.mark.parametrize("clip_norm", [0.0, 0.1], ids=["free", "clipped"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_equals_the_equations_on_plain_meta_gradients(case, count, clip_norm, graph):
    learner = MAML(small_model(), lr=0.1, steps=2, loss=F.mse_loss)
    step = make_step(case, learner, graph=graph, clip_norm=clip_norm)
    model = small_model()
    parameters = list(model.parameters())
    by_hand = ByHand(case, [p.detach() for p in parameters])
    for number, rate in enumerate(RATES):
        batches = small_batches(number, count)
        truth = plain_maml(model, joined(batches), F.mse_loss, lr=0.1, steps=2)
        norm = torch.cat([g.flatten() for g in truth.gradients]).norm()
        report = step(batches if count > 1 else batches[0], rate)
        torch.testing.assert_close(report.gradient_norm, norm, rtol=1e-10, atol=0)
        torch.testing.assert_close(report.loss, truth.loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(report.query_losses, truth.query_losses.detach(), rtol=1e-10, atol=0)
        scale = min(1.0, clip_norm / (norm.item() + 1e-6)) if clip_norm else 1.0
        assert not clip_norm or scale < 1, "clipping must have an effect"
        with torch.no_grad():
            by_hand.step(parameters, [g * scale for g in truth.gradients], rate)
        for p, q in zip(learner.model.parameters(), parameters):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@learners
@pytest.mark.parametrize("clip_norm", [0.0, 0.05], ids=["free", "clipped"])
def test_meta_batches_accumulate_to_a_larger_one(kind, clip_norm):
    parts, whole = (make_step("momentum", make_learner(kind), clip_norm=clip_norm) for _ in range(2))
    for number, rate in enumerate(RATES):
        batches = make_batches(number, 3)
        report, expected = parts(batches, rate), whole(joined(batches), rate)
        for ours, theirs in zip(report, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(state_of(parts), state_of(whole), rtol=1e-9, atol=1e-10)


@cases
@accumulations
def test_captured_iterations_equal_eager_ones(case, count):
    eager, graph = (make_step(case, make_learner(), graph=graph, clip_norm=0.5) for graph in (False, True))
    for number, rate in enumerate(RATES):
        expected = eager(make_batches(number, count), rate)
        assert_equal(list(graph(make_batches(number, count), rate)), list(expected))
        assert_equal(state_of(graph), state_of(eager))


def test_a_graph_takes_as_many_meta_batches_as_it_captured():
    step = make_step("sgd", make_learner(), graph=True)
    step(make_batches(0, 2), 0.1)
    before = state_of(step)
    with pytest.raises(ValueError, match="batch: expected 2 meta-batches as captured, got 1: another number needs"):
        step(make_batches(0, 1), 0.1)
    with pytest.raises(ValueError, match=r"batch\.support\.x: expected \(1, 6, 2, 9, 9\) .* as captured"):
        step(make_batches(0, 2)[::-1], 0.1)
    with pytest.raises(ValueError, match="batch: expected at least one meta-batch, got none"):
        step([], 0.1)
    assert_equal(state_of(step), before)


@cases
@pytest.mark.parametrize("first", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_what_is_not_finite_leaves_everything_as_it_was(case, first, graph):
    """Of the second meta-batch: no step, no decay, and iterations after it as if it had not been."""
    step, undisturbed = (make_step(case, make_learner(), graph=graph) for _ in range(2))
    for number in range(first):
        for each in (step, undisturbed):
            each(make_batches(number, 2), RATES[number])
    before = [p.detach().clone() for p in step.learner.parameters()]
    broken = make_batches(7, 2)
    broken[1].query.x[0] = math.nan
    with pytest.raises(FloatingPointError, match="the query loss of task 1 is nan"):
        step.check_finite(step(broken, 0.01).on_host())
    assert_equal([p.detach() for p in step.learner.parameters()], before)
    for number in (2, 3):
        for each in (step, undisturbed):
            each(make_batches(number, 2), RATES[number])
    assert_equal(state_of(step), state_of(undisturbed))


@pytest.mark.parametrize("case", ["sgd", "momentum", "nesterov", "adamw"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_checkpoint_goes_on_exactly(case, graph, tmp_path):
    step, again = (make_step(case, make_learner(), graph=graph) for _ in range(2))
    for number in (0, 1):
        step(make_batch(number), RATES[number])
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"learner": step.learner.state_dict(), "config": {}, "progress": {}, "rng": {},
                           "optimizer": checkpoint.optimizer_values(step.optimizer)})  # fmt: skip
    state = checkpoint.load(path)
    checkpoint.restore_learner(path, again.learner, state["learner"])
    checkpoint.restore_optimizer(path, again.optimizer, state["optimizer"])
    for each in (step, again):
        each(make_batch(2), RATES[2])
    assert_equal(state_of(again), state_of(step))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.update(momentum_buffer=torch.zeros(3)), "momentum_buffer of parameter 0: expected"),
        (lambda state: state.update(momentum_buffer=None), "momentum_buffer of parameter 0: expected a tensor"),
    ],
    ids=["shape", "none"],
)
def test_a_momentum_that_does_not_fit_is_refused(edit, message):
    step = make_step("momentum", make_learner())
    step(make_batch(0), 0.1)
    values = checkpoint.optimizer_values(step.optimizer)
    edit(values["state"][0])
    with pytest.raises(ValueError, match=f"last.pt: {message}"):
        checkpoint.restore_optimizer("last.pt", make_step("momentum", make_learner()).optimizer, values)
