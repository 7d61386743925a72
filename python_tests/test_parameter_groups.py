"""A meta-step with an optimizer for part of the learner, in groups: plain torch's numbers, one set of parameters."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kfo_ext import MAML
from kfo_ext.runs import checkpoint
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import MetaStep, make_adam

INNER_RATE, STEPS, CLIP = 0.1, 2, 0.05
RATES = [0.01, 0.004, 0.02]
# Groups as (names, learning rate); a part is not in any.
GROUPS = {
    "part": [(["2.weight", "2.bias"], 0.5)],
    "ratios": [(["0.weight", "0.bias"], 0.1), (["2.weight"], 0.02), (["2.bias"], 0.05)],
    "part_in_ratios": [(["0.bias"], 0.02), (["2.weight"], 0.1)],
    "one_stands_still": [(["0.weight"], 0.0), (["0.bias", "2.weight", "2.bias"], 0.3)],
    "equal_rates": [(["0.weight", "0.bias"], 0.0), (["2.weight"], 0.0)],
}
groups_of = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_batch(seed: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    parts = (
        (torch.randn(2, 5, 3, generator=generator).double(), torch.randn(2, 5, 2, generator=generator).double())
        for _ in range(2)
    )
    return TaskBatch(*(Examples(*part) for part in parts))


def make_step(groups, *, graph: bool = False, clip_norm: float = 0.0, model: nn.Module | None = None, **options):
    learner = MAML(model or make_model(), lr=INNER_RATE, steps=STEPS, loss=nn.functional.mse_loss)
    named = dict(learner.model.named_parameters())
    rates = [torch.tensor(lr, dtype=torch.float64) if graph else lr for _, lr in groups]
    groups = [{"params": [named[n] for n in names], "lr": lr} for (names, _), lr in zip(groups, rates)]
    adam = torch.optim.Adam(groups, fused=True, **options)
    if not graph:
        return MetaStep(learner, adam, clip_norm=clip_norm)
    owned = nn.ParameterList([p for group in groups for p in group["params"]])
    return CapturedMetaStep(learner, adam, clip_norm=clip_norm, recorder=EagerRecorder(owned))


def plain_loss(model: nn.Module, batch: TaskBatch) -> torch.Tensor:
    """MAML's loss, task by task."""
    losses = []
    for sx, sy, qx, qy in zip(*batch.support, *batch.query):
        theta = dict(model.named_parameters())
        for _ in range(STEPS):
            loss = nn.functional.mse_loss(functional_call(model, theta, sx), sy)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: p - INNER_RATE * g for (name, p), g in zip(theta.items(), gradients)}
        losses.append(nn.functional.mse_loss(functional_call(model, theta, qx), qy))
    return torch.stack(losses).mean()


class Plain:
    """Plain torch with the same groups, whose rates are the given one times their ratio to the largest."""

    def __init__(self, groups, clip_norm: float) -> None:
        self.model = make_model()
        self.clip_norm = clip_norm or math.inf
        named = dict(self.model.named_parameters())
        groups = [{"params": [named[n] for n in names], "lr": lr} for names, lr in groups]
        self.optimizer = torch.optim.Adam(groups, foreach=False, fused=False)
        largest = max(group["lr"] for group in groups)
        self.ratios = [group["lr"] / largest if largest else 1.0 for group in groups]

    def step(self, batch: TaskBatch, rate: float) -> torch.Tensor:
        """The norm before clipping."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p, gradient in zip(parameters, torch.autograd.grad(plain_loss(self.model, batch), parameters)):
            p.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        for group, ratio in zip(self.optimizer.param_groups, self.ratios):
            group["lr"] = rate * ratio
        self.optimizer.step()
        return norm


def assert_same_values(step: MetaStep, model: nn.Module) -> None:
    for (name, p), q in zip(step.learner.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@groups_of
@pytest.mark.parametrize("clip_norm", [0.0, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_equals_plain_torch_on_the_same_groups(groups, clip_norm, graph):
    step, plain = make_step(groups, graph=graph, clip_norm=clip_norm), Plain(groups, clip_norm)
    for number, rate in enumerate(RATES):
        norm = plain.step(make_batch(number), rate)
        assert norm > CLIP, "clipping must have an effect"
        report = step(make_batch(number), rate)
        torch.testing.assert_close(report.gradient_norm, norm, rtol=1e-10, atol=0)
        assert_same_values(step, plain.model)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_no_gradient_gathers_from_call_to_call(graph):
    step = make_step(GROUPS["part"], graph=graph)
    first, last = step.learner.model[0], step.learner.model[2]
    # What someone else keeps there is theirs.
    first.bias.grad = kept = torch.full_like(first.bias, math.nan)
    norms = []
    for _ in range(3):
        report = step(make_batch(0), 0.0).on_host()
        step.check_finite(report)
        norms.append(report.gradient_norm.item())
        assert first.weight.grad is None
        assert first.bias.grad is kept
        assert last.weight.grad is not None
    assert norms[0] == norms[1] == norms[2]
    assert norms[0] == pytest.approx(Plain(GROUPS["part"], 0.0).step(make_batch(0), 0.0).item(), rel=1e-10)


def trained(groups, optimizer_of) -> MetaStep:
    """A first step at rate 0 and a second one by a new MetaStep, whose optimizer `optimizer_of` makes of the first."""
    first = make_step(groups)
    first(make_batch(0), 0.0)
    second = make_step([(names, 0.7) for names, _ in groups], model=copy.deepcopy(first.learner.model))
    optimizer_of(second, first.optimizer)
    second(make_batch(1), RATES[0])
    return second


def load_before(step: MetaStep, optimizer: torch.optim.Adam) -> None:
    adam = torch.optim.Adam([{"params": group["params"]} for group in step.optimizer.param_groups], fused=True)
    adam.load_state_dict(optimizer.state_dict())
    step.__init__(step.learner, adam)


@groups_of
@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda step, optimizer: step.optimizer.load_state_dict(optimizer.state_dict()),
        load_before,
        lambda step, optimizer: checkpoint.restore_optimizer(
            "last.pt", step.optimizer, checkpoint.optimizer_values(optimizer)
        ),
    ],
    ids=["after_it_was_built", "before_it_was_built", "checkpoint"],
)
def test_a_loaded_state_keeps_the_ratios(groups, optimizer_of):
    step, plain = trained(groups, optimizer_of), Plain(groups, 0.0)
    for number, rate in enumerate([0.0, RATES[0]]):
        plain.step(make_batch(number), rate)
    assert_same_values(step, plain.model)


def test_a_group_that_is_added_brings_its_own_ratio():
    step, plain = make_step(GROUPS["part"]), Plain([*GROUPS["part"], (["0.weight"], 0.25)], 0.0)
    step.optimizer.add_param_group({"params": [step.learner.model[0].weight], "lr": 0.25})
    plain.step(make_batch(0), 0.01)
    step(make_batch(0), 0.01)
    assert_same_values(step, plain.model)


def test_a_schedulers_initial_rates_are_the_same_key():
    step, plain = make_step(GROUPS["ratios"]), Plain(GROUPS["ratios"], 0.0)
    torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda epoch: 0.5)
    step.__init__(step.learner, step.optimizer)
    plain.step(make_batch(0), 0.01)
    step(make_batch(0), 0.01)
    assert_same_values(step, plain.model)


def test_a_parameter_twice_in_a_group_is_measured_and_clipped_once():
    groups = [(["2.bias", "2.bias"], 0.1)]
    with warnings.catch_warnings():
        # torch warns, and steps twice.
        warnings.simplefilter("ignore", UserWarning)
        step, plain = make_step(groups, clip_norm=CLIP), Plain([(["2.bias"], 0.1)], CLIP)
    norm = plain.step(make_batch(0), 0.0)
    assert step(make_batch(0), 0.0).gradient_norm.item() == pytest.approx(norm.item(), rel=1e-10)
    torch.testing.assert_close(step.learner.model[2].bias.grad, plain.model[2].bias.grad, rtol=1e-10, atol=0)


def test_frozen_parameters_have_no_part_in_it():
    """Frozen in the optimizer: with a gradient from elsewhere, which Adam would apply."""
    groups = GROUPS["ratios"]
    step, plain = make_step(groups, clip_norm=CLIP), Plain(groups, CLIP)
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    frozen.grad = torch.ones_like(frozen)
    step.learner.register_parameter("frozen", frozen)
    step.optimizer.add_param_group({"params": [frozen], "lr": 0.1})
    for number, rate in enumerate(RATES):
        norm = plain.step(make_batch(number), rate)
        torch.testing.assert_close(step(make_batch(number), rate).gradient_norm, norm, rtol=1e-10, atol=0)
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert_same_values(step, plain.model)


def test_an_optimizer_whose_parameters_are_all_frozen_is_refused():
    learner = MAML(make_model(), lr=INNER_RATE, steps=STEPS, loss=nn.functional.mse_loss)
    learner.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
    step = MetaStep(learner, make_adam([learner.frozen], 0.1))
    with pytest.raises(
        ValueError, match="optimizer: expected a parameter that requires a gradient, got only frozen ones"
    ):
        step(make_batch(0), 0.01)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_foreign_parameter_is_named(graph):
    step = make_step(GROUPS["part"], graph=graph)
    foreign = nn.Linear(3, 2).double()
    message = r"optimizer: expected parameters of the learner, got parameter 1 \(2,\) of group 1"
    rate = torch.tensor(0.1, dtype=torch.float64) if graph else 0.1
    step.optimizer.add_param_group({"params": [step.learner.model[0].weight, foreign.bias], "lr": rate})
    with pytest.raises(ValueError, match=message):
        step(make_batch(0), 0.01)
    with pytest.raises(ValueError, match=message):
        step.__init__(step.learner, step.optimizer)


def test_a_foreign_parameter_is_named_by_its_name():
    learner = MAML(make_model(), lr=INNER_RATE, steps=STEPS, loss=nn.functional.mse_loss)
    adam = torch.optim.Adam([("encoder.weight", nn.Linear(3, 2).weight)], fused=True)
    with pytest.raises(ValueError, match=r"got encoder\.weight \(2, 3\): build the optimizer of its own parameters"):
        MetaStep(learner, adam)
    # Those of the model that a learner was made a copy of.
    twin = copy.deepcopy(learner)
    with pytest.raises(ValueError, match=r"got parameter 0 \(4, 3\) of group 0"):
        MetaStep(twin, make_adam(learner.parameters(), 0.1))


def test_a_graph_takes_no_group_whose_rate_it_would_keep():
    """A number as the rate is refused at every call; a group that came after the capture, or left it, too."""
    step = make_step(GROUPS["part"], graph=True)
    step.optimizer.add_param_group({"params": [step.learner.model[0].weight], "lr": 0.1})
    with pytest.raises(ValueError, match="optimizer: expected a learning rate that is a tensor"):
        step(make_batch(0), 0.01)
    step.optimizer.param_groups[1]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    step(make_batch(0), 0.01)
    rate = torch.tensor(0.1, dtype=torch.float64)
    step.optimizer.add_param_group({"params": [step.learner.model[0].bias], "lr": rate})
    with pytest.raises(RuntimeError, match="cuda_graph: parameters or the optimizer's state are other tensors than"):
        step(make_batch(0), 0.01)
    step.optimizer.param_groups.pop()
    step(make_batch(0), 0.01)
    step.learner.model[2].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="or were frozen or unfrozen since: build a new CapturedMetaStep"):
        step(make_batch(0), 0.01)


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate):
    step = make_step(GROUPS["ratios"])
    before = copy.deepcopy(step.learner.state_dict())
    with pytest.raises(ValueError, match="rate: expected a finite number of at least 0, got"):
        step(make_batch(0), rate)
    assert all(torch.equal(X, before[name]) for name, X in step.learner.state_dict().items() if torch.is_tensor(X))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_iteration_that_is_not_finite_leaves_every_group_as_it_was(graph):
    step, twin = (make_step(GROUPS["ratios"], graph=graph) for _ in range(2))
    step(make_batch(0), 0.01)
    batch = make_batch(1)
    batch.query.x[1] = math.nan
    with pytest.raises(FloatingPointError, match="the query loss of task 1 is nan"):
        step.check_finite(step(batch, 0.01).on_host())
    step(make_batch(2), 0.02)
    twin(make_batch(0), 0.01)
    twin(make_batch(2), 0.02)
    assert_same_values(step, twin.learner.model)
