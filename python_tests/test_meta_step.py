"""A meta-iteration as a unit: right, without reading a value, harmless where not finite."""

from __future__ import annotations

import math
import re

import pytest
import torch
from meta_steps import RATES, TASKS, adam_of, assert_equal, captured, learners, make_batch, make_learner, state_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfo_ext.runs import checkpoint
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import MetaReport, MetaStep


@learners
@pytest.mark.parametrize("clip_norm", [0.0, 0.05, 1e6], ids=["free", "clipped", "not_clipped"])
def test_equals_a_loop_by_hand(kind, clip_norm):
    ours, theirs = make_learner(kind), make_learner(kind)
    step = MetaStep(ours, adam_of(ours), clip_norm=clip_norm)
    parameters = list(theirs.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for number, rate in enumerate(RATES):
        batch = make_batch(number)
        report = step(batch, rate)
        result = theirs(batch)
        gradients = torch.autograd.grad(result.loss, parameters, allow_unused=True)
        norm = sum(g.square().sum() for g in gradients if g is not None).sqrt()
        assert not clip_norm or (norm > clip_norm) == (clip_norm < 1)
        for p, g, m, v in zip(parameters, gradients, first, second):
            if g is None:
                continue
            if clip_norm:
                g = g * min(1.0, clip_norm / (norm.item() + 1e-6))
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            ahead = (m / (1 - 0.9 ** (number + 1))) / ((v / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                p.sub_(rate * ahead)
        torch.testing.assert_close(report.loss, result.loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(report.gradient_norm, norm, rtol=1e-8, atol=0)
        torch.testing.assert_close(report.query_losses, result.query_losses, rtol=1e-10, atol=0)
        torch.testing.assert_close(report.support_losses, result.support_losses, rtol=1e-10, atol=0)
        assert report.metric == result.metrics.mean()
        step.check_finite(report.on_host())
        # Adam divides by the gradient's size: 1e-8 where a bias before batch norm has none but rounding.
        assert not report.loss.requires_grad
        for (name, a), b in zip(ours.named_parameters(), parameters):
            if not name.endswith("conv.bias"):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


class NoReading(TorchDispatchMode):
    """Raises where a value goes to the host, or a shape depends on values: on CUDA each of them waits."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert not name.startswith(self.READS), f"{name} reads a value"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(X is not None and X.dtype == torch.bool for X in args[1]), "a mask as an index"
        # A tensor made from Python's numbers is a copy from pageable memory on CUDA.
        assert name not in ("lift_fresh", "lift_fresh_copy"), "a tensor made of numbers"
        return func(*args, **(kwargs or {}))


@learners
def test_no_value_is_read(kind):
    learner = make_learner(kind)
    step = MetaStep(learner, adam_of(learner, tensor_rate=True), clip_norm=0.1)
    batch = make_batch(0)
    step(batch, 0.01)
    with NoReading():
        report = step(batch, 0.01)
    assert report.loss.isfinite()


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: torch.tensor([1.0]) + x])
def test_the_watch_for_reading_sees_it(read):
    x = torch.ones(3)
    with pytest.raises(AssertionError), NoReading():
        read(x)


def broken(batch: TaskBatch, part: str) -> TaskBatch:
    x = getattr(batch, part).x.clone()
    x[-1] = math.nan
    return batch._replace(**{part: Examples(x, getattr(batch, part).y)})


@pytest.mark.parametrize(
    "make", [lambda learner: MetaStep(learner, adam_of(learner)), captured], ids=["eager", "graph"]
)
@pytest.mark.parametrize("clip_norm", [0.0, 0.1], ids=["free", "clipped"])
@pytest.mark.parametrize("part", ["support", "query"])
def test_what_is_not_finite_leaves_everything_as_it_was(make, part, clip_norm):
    step = make(make_learner())
    step.clip_norm = clip_norm
    where = {"support": "the support loss of step 1 of task 1 is nan", "query": "the query loss of task 1 is nan"}
    for number, rate in enumerate(RATES[:2]):
        step.check_finite(step(make_batch(number), rate).on_host())
    before = state_of(step)
    assert any(X.numel() == 1 and X == 2 for X in before), "Adam's counter must be among them"
    report = step(broken(make_batch(7), part), 0.01).on_host()
    with pytest.raises(FloatingPointError, match=where[part]):
        step.check_finite(report)
    assert_equal(state_of(step), before)
    report = step(make_batch(2), RATES[2]).on_host()
    step.check_finite(report)
    undisturbed = make(make_learner())
    undisturbed.clip_norm = clip_norm
    for number, rate in enumerate(RATES[:3]):
        undisturbed(make_batch(number), rate)
    assert_equal(state_of(step), state_of(undisturbed))
    assert not hasattr(step.optimizer, "found_inf")


@pytest.mark.parametrize("call", [1, 4], ids=["support", "query"])
def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(call):
    calls = []

    def loss(output, y):
        calls.append(output)
        offset = math.inf if math.ceil(len(calls) / TASKS) == math.ceil(call / TASKS) else 0.0
        return nn.functional.cross_entropy(output, y) + offset

    step = MetaStep(learner := make_learner(loss=loss), adam_of(learner))
    before = [p.detach().clone() for p in learner.parameters()]
    report = step(make_batch(0), 0.01).on_host()
    assert report.gradient_norm.isfinite()
    with pytest.raises(FloatingPointError, match="of task 0 is inf"):
        step.check_finite(report)
    assert_equal([p.detach() for p in learner.parameters()], before)


def test_not_finite_at_the_first_step():
    step = MetaStep(learner := make_learner(), adam_of(learner))
    before = [p.detach().clone() for p in learner.parameters()]
    step(broken(make_batch(0), "query"), 0.01)
    assert_equal([p.detach() for p in learner.parameters()], before)
    assert all(not X.any() for state in step.optimizer.state.values() for X in state.values())


@pytest.mark.parametrize("clip_norm", [0.0, 0.1], ids=["free", "clipped"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_parameter_whose_gradient_is_not_finite_is_named(value, clip_norm):
    step = MetaStep(learner := make_learner(), adam_of(learner), clip_norm=clip_norm)
    name, parameter = list(learner.named_parameters())[4]
    parameter.register_hook(lambda gradient: gradient * value)
    before = [p.detach().clone() for p in learner.parameters()]
    report = step(make_batch(0), 0.01).on_host()
    with pytest.raises(
        FloatingPointError, match=f"^the meta-gradient of {re.escape(name)} is not finite: lower .*--inner-lr"
    ):
        step.check_finite(report)
    assert_equal([p.detach() for p in learner.parameters()], before)


def test_a_norm_that_overflows_is_named():
    step = MetaStep(learner := make_learner(), adam_of(learner), clip_norm=0.1)
    next(learner.parameters()).register_hook(lambda gradient: torch.full_like(gradient, 1e200))
    with pytest.raises(FloatingPointError, match=r"^the norm of the meta-gradient is not finite: lower .*--inner-lr"):
        step.check_finite(step(make_batch(0), 0.01).on_host())


def test_a_report_travels_as_one_tensor():
    report = MetaReport(*(torch.randn(size, dtype=torch.float64) for size in ((), (3, 2), (2,), ())), torch.tensor(0.3))
    host = report.on_host()
    for a, b in zip(host, report, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b.double())
    assert len({X.untyped_storage().data_ptr() for X in host}) == 1
    regression = report._replace(metric=None).on_host()
    assert regression.metric is None
    assert torch.equal(regression.gradient_norm, report.gradient_norm)


def test_refuses_what_it_cannot_do():
    learner = make_learner()
    with pytest.raises(ValueError, match="clip_norm: expected at least 0, got -1"):
        MetaStep(learner, adam_of(learner), clip_norm=-1)
    expected = "optimizer: expected Adam, AdamW or SGD with fused=True, which can leave out a step on the device, got"
    with pytest.raises(ValueError, match=f"{expected} Adam with fused=False"):
        MetaStep(learner, torch.optim.Adam(learner.parameters()))
    with pytest.raises(ValueError, match=f"{expected} Adagrad$"):
        MetaStep(learner, torch.optim.Adagrad(learner.parameters(), fused=True))
    damped = torch.optim.SGD(learner.parameters(), momentum=0.9, dampening=0.5, fused=True)
    with pytest.raises(ValueError, match=r"optimizer: expected an SGD with dampening=0, got dampening=0\.5"):
        MetaStep(learner, damped)(make_batch(0), 0.1)
    with pytest.raises(ValueError, match="batch: expected at least one meta-batch, got none"):
        MetaStep(learner, adam_of(learner))([], 0.1)
    with pytest.raises(ValueError, match="cuda_graph: expected a learner on a CUDA device, got one on cpu"):
        CapturedMetaStep(learner, adam_of(learner, True))
    with pytest.raises(ValueError, match="optimizer: expected a learning rate that is a tensor"):
        CapturedMetaStep(learner, adam_of(learner), recorder=EagerRecorder(learner))
    with pytest.raises(ValueError, match="cuda_graph: expected a learner with checkpoint=False"):
        captured(make_learner(checkpoint=True))


def test_a_checkpoint_of_an_adam_computed_otherwise_is_taken(tmp_path):
    learner = make_learner()
    plain = torch.optim.Adam(learner.parameters(), lr=0.01, foreach=True)
    learner(make_batch(0)).loss.backward()
    plain.step()
    ours = adam_of(learner, tensor_rate=True)
    checkpoint.restore_optimizer(tmp_path, ours, checkpoint.optimizer_values(plain))
    group = ours.param_groups[0]
    assert group["fused"] is True
    assert group["foreach"] is None
    assert group["lr"].item() == 0.01
    MetaStep(learner, ours)(make_batch(0), 0.01)
    assert {state["step"].item() for state in ours.state.values()} == {2.0}
    # And back.
    checkpoint.restore_optimizer(tmp_path, plain, checkpoint.optimizer_values(ours))
    assert plain.param_groups[0]["foreach"] is True
    assert plain.param_groups[0]["lr"] == 0.01
