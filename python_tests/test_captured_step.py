"""A captured meta-iteration: as an eager one, no trace of its warm-up, and refused where it cannot follow."""

from __future__ import annotations

import contextlib

import pytest
import torch
from meta_steps import RATES, WAVES, WAYS, adam_of, assert_equal, captured, learners, make_batch, make_learner, state_of
from torch import nn

from kfo_ext import MAML
from kfo_ext.runs import checkpoint
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer import Config, Trainer
from kfo_ext.trainer.captured_step import WARMUPS, CapturedMetaStep, GraphRecorder, undone
from kfo_ext.trainer.meta_step import MetaStep


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
    saved = checkpoint.load(second.run.last)["optimizer"]["param_groups"][0]
    assert isinstance(saved["lr"], float)
    assert not saved["capturable"]
