"""A meta-iteration as a unit: right, without reading a value, harmless where not finite; captured, it does the same."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.models import CNN
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer import Config, Trainer, checkpoint, evaluate_run, load_learner
from kfo_ext.trainer.captured_step import WARMUPS, CapturedMetaStep, GraphRecorder, undone
from kfo_ext.trainer.meta_step import MetaReport, MetaStep, make_adam
from kfo_ext.trainer.precision import convolution_precision

TASKS, WAYS = 2, 3
LEARNERS = {
    "maml": (MAML, {}, None),
    "maml-plain": (MAML, {}, {}),
    "maml-psd": (MAML, {"adapt_update": True}, {"psd": True, "bias": True}),
    "maml-hidden": (MAML, {"adapt_update": True}, {"psd": False, "hidden_layers": 1}),
    "by-task": (MAML, {"adapt_update": True, "batched": False}, {}),
    "first-order": (MAML, {"adapt_update": True, "first_order": True}, {}),
    "anil": (ANIL, {"adapt_update": True}, {}),
}
learners = pytest.mark.parametrize("kind", LEARNERS)
RATES = [0.01, 0.007, 0.003, 0.02]


def make_learner(kind: str = "maml-psd", dtype: torch.dtype = torch.float64, **changes) -> MAML:
    learner, options, update = LEARNERS[kind]
    torch.manual_seed(0)
    model = CNN(2, in_channels=2, hidden=4, ways=WAYS, image_size=9, stride=2).to(dtype)
    adapted = model if learner is MAML else model.head
    kfo = None if update is None else KFO(adapted.named_parameters(), **update)
    if kfo is not None:
        with torch.no_grad():
            for parameter in kfo.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return learner(model, update=kfo, lr=0.1, steps=2, **{**options, **changes})


def make_batch(seed: int, dtype: torch.dtype = torch.float64, tasks: int = TASKS) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def examples(count: int) -> Examples:
        x = torch.rand(tasks, count, 2, 9, 9, generator=generator, dtype=torch.float64).to(dtype)
        return Examples(x, torch.randint(0, WAYS, (tasks, count), generator=generator))

    return TaskBatch(examples(6), examples(5))


def adam_of(learner: MAML, tensor_rate: bool = False) -> torch.optim.Adam:
    adam = make_adam(learner.parameters(), 1.0)
    if tensor_rate:
        # As on CUDA, but float64: the CPU's Adam reads the number itself.
        adam.param_groups[0]["lr"] = torch.tensor(1.0, dtype=torch.float64)
    return adam


def captured(learner: MAML, **options) -> CapturedMetaStep:
    return CapturedMetaStep(learner, adam_of(learner, True), recorder=EagerRecorder(learner), **options)


def state_of(step: MetaStep) -> list[torch.Tensor]:
    adam = step.optimizer.state
    parameters = list(step.learner.parameters())
    return [X.clone() for p in parameters for X in (p.detach(), *(adam[p].values() if p in adam else ()))]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


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
        assert report.accuracy == result.accuracies.mean()
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
    with pytest.raises(FloatingPointError, match=f"^the meta-gradient of {re.escape(name)} is not finite$"):
        step.check_finite(report)
    assert_equal([p.detach() for p in learner.parameters()], before)


def test_a_norm_that_overflows_is_named():
    step = MetaStep(learner := make_learner(), adam_of(learner), clip_norm=0.1)
    next(learner.parameters()).register_hook(lambda gradient: torch.full_like(gradient, 1e200))
    with pytest.raises(FloatingPointError, match=r"^the norm of the meta-gradient is not finite$"):
        step.check_finite(step(make_batch(0), 0.01).on_host())


def test_a_report_travels_as_one_tensor():
    report = MetaReport(*(torch.randn(size, dtype=torch.float64) for size in ((), (3, 2), (2,), ())), torch.tensor(0.3))
    host = report.on_host()
    for a, b in zip(host, report, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b.double())
    assert len({X.untyped_storage().data_ptr() for X in host}) == 1
    regression = report._replace(accuracy=None).on_host()
    assert regression.accuracy is None
    assert torch.equal(regression.gradient_norm, report.gradient_norm)


def test_refuses_what_it_cannot_do():
    learner = make_learner()
    with pytest.raises(ValueError, match="clip_norm: expected at least 0, got -1"):
        MetaStep(learner, adam_of(learner), clip_norm=-1)
    with pytest.raises(ValueError, match="optimizer: expected an Adam with fused=True"):
        MetaStep(learner, torch.optim.Adam(learner.parameters()))
    with pytest.raises(ValueError, match="optimizer: expected an Adam with fused=True"):
        MetaStep(learner, torch.optim.SGD(learner.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="cuda_graph: expected a learner on a CUDA device, got one on cpu"):
        CapturedMetaStep(learner, adam_of(learner, True))
    with pytest.raises(ValueError, match="optimizer: expected a learning rate that is a tensor"):
        CapturedMetaStep(learner, adam_of(learner), recorder=EagerRecorder(learner))
    with pytest.raises(ValueError, match="cuda_graph: expected a learner with checkpoint=False"):
        captured(make_learner(checkpoint=True))


@learners
@pytest.mark.parametrize("done", [0, 2], ids=["from_the_start", "in_the_middle"])
def test_captured_iterations_equal_eager_ones(kind, done):
    eager = MetaStep(learner := make_learner(kind), adam_of(learner, True), clip_norm=0.5)
    again = captured(make_learner(kind), clip_norm=0.5)
    for number in range(done):
        eager(make_batch(number), RATES[number])
        MetaStep(again.learner, again.optimizer, clip_norm=0.5)(make_batch(number), RATES[number])
    for number in range(done, len(RATES)):
        expected = eager(make_batch(number), RATES[number])
        report = again(make_batch(number), RATES[number])
        assert_equal(list(report), list(expected))
        assert_equal(state_of(again), state_of(eager))
    gradients = [[p.grad for p in step.learner.parameters() if p.grad is not None] for step in (again, eager)]
    assert_equal(*gradients)


def test_a_report_of_a_replay_is_memory_of_the_graph():
    step = captured(make_learner())
    first = step(make_batch(0), 0.01)
    kept = first.loss.clone()
    assert step(make_batch(1), 0.01).loss is first.loss
    assert first.loss != kept


def test_gradients_that_were_forgotten_come_back():
    step, eager = captured(make_learner()), MetaStep(learner := make_learner(), adam_of(learner, True))
    for number, rate in enumerate(RATES[:2]):
        for each in (step, eager):
            each.optimizer.zero_grad()
            each(make_batch(number), rate)
    assert_equal(*([p.grad for p in each.learner.parameters()] for each in (step, eager)))


class Noisy(nn.Module):
    """A linear layer with dropout and a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(162, WAYS)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(nn.functional.dropout(x.flatten(1), 0.5))


def test_the_warm_up_leaves_no_trace_in_buffers_and_random_numbers():
    def steps(make):
        torch.manual_seed(0)
        model = Noisy().double()
        step = make(MAML(model, lr=0.1, steps=2))
        torch.manual_seed(5)
        losses = [step(make_batch(number), 0.01).loss.item() for number in range(3)]
        return losses, model.calls.item(), torch.get_rng_state()

    eager = steps(lambda learner: MetaStep(learner, adam_of(learner, True)))
    replayed = steps(captured)
    assert eager[:2] == replayed[:2]
    assert torch.equal(eager[2], replayed[2])


def test_undone_undoes_after_an_error_too():
    step = MetaStep(learner := make_learner(), adam_of(learner))
    step(make_batch(0), 0.01)
    before, rng = state_of(step), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), undone(learner, step.optimizer):
        step(make_batch(1), 0.5)
        torch.rand(3)
        raise RuntimeError("stop")
    assert_equal(state_of(step), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: make_batch(1, tasks=3), r"batch\.support\.x: expected \(2, 6, 2, 9, 9\) torch\.float64 on cpu as"),
        (lambda b: make_batch(1, torch.float32), r"batch\.support\.x: .* got \(2, 6, 2, 9, 9\) torch\.float32 on cpu"),
        (
            lambda b: b._replace(query=Examples(b.query.x, b.query.y.int())),
            r"batch\.query\.y: expected \(2, 5\) torch\.int64",
        ),
        (lambda b: b.to("meta"), r"batch\.support\.x: .* got .* on meta"),
    ],
    ids=["tasks", "dtype", "labels", "device"],
)
def test_a_batch_of_another_kind_is_refused(change, message):
    step = captured(make_learner())
    if "meta" in message:
        with pytest.raises(ValueError, match="batch: expected tensors on cpu as the learner is, got one on meta"):
            step(change(make_batch(1)), 0.01)
    report = step(make_batch(0), 0.01)
    before, loss = state_of(step), report.loss.clone()
    with pytest.raises(ValueError, match=message):
        step(change(make_batch(1)), 0.01)
    assert_equal(state_of(step), before)
    assert torch.equal(report.loss, loss)
    # A batch in other strides is the same batch.
    odd = TaskBatch(*(Examples(part.x.mT.contiguous().mT, part.y) for part in make_batch(1)))
    twin = captured(make_learner())
    twin(make_batch(0), 0.01)
    assert torch.equal(step(odd, 0.01).loss, twin(make_batch(1), 0.01).loss)


@pytest.mark.parametrize("what", ["optimizer", "parameter", "frozen"])
def test_replaced_tensors_are_refused(what):
    step = captured(make_learner())
    step(make_batch(0), 0.01)
    if what == "optimizer":
        step.optimizer.load_state_dict(step.optimizer.state_dict())
    elif what == "parameter":
        parameter = next(step.learner.parameters())
        parameter.data = parameter.data.clone()
    else:
        step.optimizer.state.clear()
    with pytest.raises(RuntimeError, match="other tensors than those captured"):
        step(make_batch(0), 0.01)


def test_values_loaded_in_place_are_followed():
    step = captured(make_learner())
    start = {name: X.clone() if isinstance(X, torch.Tensor) else X for name, X in step.learner.state_dict().items()}
    loss = step(make_batch(0), 0.5).loss.clone()
    step.learner.load_state_dict(start)
    assert torch.equal(step(make_batch(0), 0.01).loss, loss)


class FakeGraphs:
    """torch.cuda's part in a capture, as a list of what was called."""

    def __init__(self, monkeypatch, ending: str | None = None) -> None:
        self.calls = calls = []

        class Stream:
            def __init__(self, device=None) -> None:
                self.name = "side" if device is not None else "current"

            def wait_stream(self, other) -> None:
                calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                calls.append("replay")

        @contextlib.contextmanager
        def stream(which):
            calls.append(f"on {which.name}")
            try:
                yield
            finally:
                calls.append(f"off {which.name}")

        @contextlib.contextmanager
        def graph(graph, *, stream, capture_error_mode):
            calls.append(f"capture on {stream.name}, {capture_error_mode}")
            try:
                yield
            finally:
                calls.append("end")
                if ending:
                    raise RuntimeError(ending)

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "graph": graph,
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": Stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_recorder_warms_up_and_captures_on_one_side_stream(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    recorder = GraphRecorder(torch.device("cuda:0"))
    recorder.warm_up(lambda: fake.calls.append("run"), 2)
    assert fake.calls == [
        "side waits for current", "on side", "run", "run", "off side", "current waits for side",
    ]  # fmt: skip
    fake.calls.clear()
    replay, report = recorder.record(lambda: fake.calls.append("run") or "report")
    replay()
    assert report == "report"
    assert fake.calls == ["on side", "capture on side, thread_local", "run", "end", "off side", "replay"]


def test_a_failed_capture_says_why_and_leaves_everything_as_it_was(monkeypatch):
    fake = FakeGraphs(monkeypatch, ending="operation failed due to a previous error during capture")
    step = captured(make_learner())
    inner = step._recorder

    class Failing(GraphRecorder):
        def warm_up(self, iterate, times):
            inner.warm_up(iterate, times)

    step._recorder = Failing(torch.device("cuda:0"))
    before = [p.detach().clone() for p in step.learner.parameters()]
    right, calls = step.learner._adapt, []

    def fails_in_the_capture(*arguments):
        calls.append(arguments)
        if "capture on side, thread_local" in fake.calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        return right(*arguments)

    monkeypatch.setattr(step.learner, "_adapt", fails_in_the_capture)
    reason = "cuda_graph: the meta-iteration cannot be captured: operation not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        step(make_batch(0), 0.01)
    assert len(calls) == WARMUPS + 1
    assert fake.calls[-2:] == ["end", "off side"]
    assert_equal([p.detach() for p in step.learner.parameters()], before)
    assert all(p.grad is None for p in step.learner.parameters())
    assert not step.optimizer.param_groups[0]["capturable"]
    # An end that fails by itself is the reason itself.
    with pytest.raises(RuntimeError, match="cannot be captured: operation failed due to a previous error"):
        step._recorder.record(lambda: None)


WAVES = {
    "dataset": "sinusoid", "fast_lr": 0.01, "shots": 2, "queries": 2, "hidden": 4, "steps": 2, "meta_batch": 2,
    "validation_tasks": 4, "iterations": 6, "validation_every": 3, "meta_lr_half_life": 3,
}  # fmt: skip


def test_a_run_captured_in_its_second_half_equals_an_eager_one(tmp_path):
    whole = Trainer.start(Config(**WAVES), tmp_path / "whole")
    whole.fit()
    Trainer.start(Config(**{**WAVES, "iterations": 3}), tmp_path / "parts").fit()
    second = Trainer.resume(tmp_path / "parts", iterations=6)
    group = second.optimizer.param_groups[0]
    group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    second.meta_step = CapturedMetaStep(second.learner, second.optimizer, recorder=EagerRecorder(second.learner))
    second.fit()
    steps = [MetaStep(trainer.learner, trainer.optimizer) for trainer in (whole, second)]
    assert_equal(*map(state_of, steps))
    saved = torch.load(second.run.last, weights_only=True)["optimizer"]["param_groups"][0]
    assert isinstance(saved["lr"], float)
    assert not saved["capturable"]


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


def test_the_flag_for_convolutions_is_set_back():
    before = torch.backends.cudnn.allow_tf32
    for precision, expected in {"ieee": False, "bf16": False, "tf32": True}.items():
        with pytest.raises(RuntimeError, match="stop"), convolution_precision(precision):
            assert torch.backends.cudnn.allow_tf32 is expected
            raise RuntimeError("stop")
        assert torch.backends.cudnn.allow_tf32 is before
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32, bf16, got 'fp8'"):
        convolution_precision("fp8").__enter__()


def test_training_and_validation_run_at_the_runs_precision(tmp_path):
    trainer = Trainer.start(Config(**{**WAVES, "iterations": 1}), tmp_path / "run")
    seen = []
    trainer.learner.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    # torch's default.
    with convolution_precision("tf32"):
        trainer.fit()
        assert torch.backends.cudnn.allow_tf32
    assert len(seen) == 1 + 2
    assert not any(seen)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["maml-psd", "anil", "maml-plain"])
def test_bf16_rounds_the_forward_and_nothing_else(kind, channels_last, monkeypatch):
    right, rough = make_learner(kind), make_learner(kind, torch.float32, bf16=True)
    rough.model.channels_last = channels_last
    seen = set()
    true = torch.nn.functional.conv2d

    def conv2d(x, weight, **options):
        y = true(x, weight, **options)
        seen.add((x.is_contiguous(memory_format=torch.channels_last), y.dtype))
        return y

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    expected = right(make_batch(0))
    seen.clear()
    result = rough(make_batch(0, torch.float32))
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert all(last for last, _ in seen) == channels_last
    for losses in (result.loss, result.support_losses, result.query_losses):
        assert losses.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=0.05, atol=0)
    gradients = [
        torch.cat([g.reshape(-1).double() for g in torch.autograd.grad(loss, list(learner.parameters()))])
        for loss, learner in ((result.loss, rough), (expected.loss, right))
    ]
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert 1e-4 < error < 0.2
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_task_by_task():
    class Linear(nn.Linear):
        """Has no forward of all tasks at once."""

    model = nn.Sequential(nn.Flatten(), Linear(162, WAYS))
    rough, right = MAML(model, lr=0.1, steps=2, bf16=True), MAML(model, lr=0.1, steps=2)
    batch = make_batch(0, torch.float32)
    a, b = rough(batch).loss, right(batch).loss
    assert a.dtype == torch.float32
    assert 1e-6 < abs(a - b) < 0.02


@pytest.mark.parametrize("batched", [None, False], ids=["batched", "by_task"])
def test_bf16_gives_a_head_features_of_float32(batched):
    learner = make_learner("anil", torch.float32, bf16=True, batched=batched)
    assert {features.dtype for features in learner.inputs(make_batch(0, torch.float32))} == {torch.float32}


def test_bf16_needs_float32():
    with pytest.raises(ValueError, match=r"bf16: expected parameters of torch\.float32, .* got torch\.float64"):
        make_learner(bf16=True)(make_batch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph: expected a CUDA device, got 'cpu'"),
        ({"cuda_graph": True, "device": "cuda", "checkpoint_inner": True}, "cuda_graph: expected checkpoint_inner off"),
        ({"precision": "fp8"}, "precision: expected one of ieee, tf32, bf16, got 'fp8'"),
        ({"precision": "tf32"}, "precision: 'tf32' has no effect on device 'cpu'"),
        (
            {"precision": "tf32", "device": "cuda", "dtype": "float64"},
            "precision: 'tf32' has no effect on dtype 'float",
        ),
        ({"precision": "bf16", "dtype": "float64"}, "precision: 'bf16' has no effect on dtype 'float64'"),
        ({"precision": "tf32", "device": "cuda", "dataset": "sinusoid"}, "precision: 'tf32' has no effect on dataset"),
        ({"channels_last": True}, "channels_last: has no effect on device 'cpu'"),
        ({"channels_last": True, "device": "cuda", "dataset": "sinusoid"}, "channels_last has no effect on dataset 's"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**options)


def test_a_run_made_fast_on_a_device_is_judged_on_the_cpu(tmp_path):
    trainer = Trainer.start(Config(**{**WAVES, "dataset": "glyphs", "ways": 2}), tmp_path / "run")
    fast = replace(trainer.config, device="cuda", cuda_graph=True, channels_last=True, precision="tf32")
    fast.save(trainer.run.config)
    state = torch.load(trainer.run.last, weights_only=True)
    torch.save({**state, "config": fast.to_dict()}, trainer.run.last)
    with pytest.raises(ValueError, match="precision: 'tf32' has no effect on device 'cpu'"):
        load_learner(trainer.run, "last", device="cpu")
    config, _, _ = load_learner(trainer.run, "last", device="cpu", precision="ieee")
    assert not config.cuda_graph
    assert not config.channels_last
    assert evaluate_run(trainer.run, name="last", tasks=2, device="cpu", precision="bf16").tasks == 2
    assert json.loads(trainer.run.evaluation("test", "last").read_text())["precision"] == "bf16"


def test_options_reach_the_learner(tmp_path):
    tiny = {"shots": 2, "queries": 2, "hidden": 4, "steps": 1, "meta_batch": 2, "validation_tasks": 2, "ways": 2}
    config = Config(**tiny, iterations=1, precision="bf16", channels_last=True)
    trainer = Trainer.start(config, tmp_path / "run")
    assert trainer.learner.bf16
    assert trainer.learner.model.channels_last
    assert trainer.fit().reason == "finished"
    assert type(trainer.meta_step) is MetaStep
    assert Config(device="cuda", cuda_graph=True, precision="tf32", channels_last=True).precision == "tf32"
