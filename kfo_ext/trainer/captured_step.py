"""A meta-iteration captured as one CUDA graph, and replayed for every batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from kfo_ext.adapt import MAML
from kfo_ext.tasks import Examples, TaskBatch

from .meta_step import MetaReport, MetaStep, several

# The first makes handles, workspaces, scratch memory and the optimizer's state; two more are in torch's own recipe.
WARMUPS = 3


class Recorder(Protocol):
    """How an iteration is prepared and recorded."""

    def warm_up(self, iterate: Callable[[], object], times: int) -> None:
        """Run it so many times where it will be recorded."""
        ...

    def record(self, iterate: Callable[[], MetaReport]) -> tuple[Callable[[], object], MetaReport]:
        """A replay, and the report that each replay writes anew."""
        ...


class GraphRecorder:
    """Captures CUDA graphs, on a stream of its own.

    device: whose graphs.
    Raises: ValueError if it is no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"cuda_graph: expected a learner on a CUDA device, got one on {device}")
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, iterate: Callable[[], object], times: int) -> None:
        """Run it on the stream of the capture: autograd ties what it makes for a parameter to a stream."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(times):
                        iterate()
            finally:
                torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, iterate: Callable[[], MetaReport]) -> tuple[Callable[[], object], MetaReport]:
        """Capture it.

        Raises: RuntimeError with the first reason why it cannot be captured.
        """
        # What an uncollected cycle still holds (an autograd graph of another stream) would end the capture.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        # Threads that prepare tasks may use the device meanwhile: this one alone is held to the capture's rules.
        mode = "thread_local"
        first: list[BaseException] = []
        try:
            with (
                torch.cuda.device(self.device),
                # A capture that fails leaves its stream the current one: this sets the caller's back.
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode),
            ):
                try:
                    report = iterate()
                except BaseException as error:
                    # Ending a broken capture raises an error of its own, which says nothing.
                    first.append(error)
                    raise
        except Exception as error:
            reason = first[0] if first else error
            raise RuntimeError(f"cuda_graph: the meta-iteration cannot be captured: {reason}") from reason
        return graph.replay, report


class CapturedMetaStep(MetaStep):
    """A `MetaStep` that the first call captures and every call replays: one launch for a whole meta-iteration.

    The first call warms up on its batch and undoes that in place: the iterations equal those of a `MetaStep`. Shapes,
    types, the inner rate and everything else but the batch and the outer rate are fixed from then on. A report and the
    meta-gradients in `grad` are memory of the graph, and hold until the next call. A batch of another shape is refused,
    not captured again: a meta-batch has one shape, and every graph keeps the memory of a whole iteration.

    learner, optimizer, clip_norm: as for `MetaStep`; the rate of every group is a tensor, as `outer_rate` makes it.
    recorder: captures; by default a CUDA graph.
    Raises: ValueError as `MetaStep`, for a learner that is not on a CUDA device, one that recomputes its inner steps
    (which saves the random state, and a capture cannot read it), or a rate that is no tensor.
    """

    def __init__(
        self,
        learner: MAML,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = 0.0,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(learner, optimizer, clip_norm=clip_norm)
        if learner.checkpoint:
            raise ValueError("cuda_graph: expected a learner with checkpoint=False: recomputation cannot be captured")
        self.device = next(learner.parameters()).device
        self._recorder = GraphRecorder(self.device) if recorder is None else recorder
        self._check_rates()
        # Of the batches that are the graph's own memory: a replay, and the report that it writes.
        self._captured: tuple[list[TaskBatch], Callable[[], object], MetaReport] | None = None
        # Held so that no other tensor comes to lie at their addresses.
        self._held: list[Tensor] = []
        self._identities: list[tuple[int, bool]] = []
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, batch: TaskBatch | Sequence[TaskBatch], rate: float) -> MetaReport:
        """As `MetaStep`'s.

        Raises: ValueError for batches of another number, shape, type or device than the first ones, or as `MetaStep`;
        RuntimeError if the iteration cannot be captured, or parameters or the optimizer's state were replaced by other
        tensors or frozen since.
        """
        batches = several(batch)
        self._check_rates()
        if self._captured is None:
            self._captured = self._capture(batches)
        buffers, replay, report = self._captured
        self._check_tensors()
        _load(buffers, batches)
        self._set_rate(rate)
        replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return report

    def _capture(self, batches: Sequence[TaskBatch]) -> tuple[list[TaskBatch], Callable[[], object], MetaReport]:
        buffers = [
            TaskBatch(*(Examples(*(_checked_device(X, self.device).clone() for X in part)) for part in batch))
            for batch in batches
        ]

        def run() -> MetaReport:
            return self._iterate(buffers)

        with undone(self.learner, self.optimizer):
            self._recorder.warm_up(run, WARMUPS)
        # Adam's alone.
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        before = [group["capturable"] for group in groups]
        for group in groups:
            # A fused Adam is the same either way; torch asks for the word in a capture, and warns of it elsewhere.
            group["capturable"] = True
        try:
            replay, report = self._recorder.record(run)
        except BaseException:
            self.optimizer.zero_grad()
            raise
        finally:
            for group, value in zip(groups, before):
                group["capturable"] = value
        self._held = self._tensors()
        self._identities = _identities(self._held)
        self._gradients = [(parameter, parameter.grad) for parameter in self._parameters()]
        return buffers, replay, report

    def _tensors(self) -> list[Tensor]:
        """All that the graph reads and writes in place by address, but for the batch."""
        states = self.optimizer.state
        parameters = self._parameters()
        # In the order of the parameters: that of the states is of their first steps.
        own = [X for p in parameters for X in states.get(p, {}).values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [*self.learner.parameters(), *self.learner.buffers(), *parameters, *own, *rates]

    def _check_rates(self) -> None:
        if not all(isinstance(group["lr"], Tensor) for group in self.optimizer.param_groups):
            raise ValueError("optimizer: expected a learning rate that is a tensor: a graph would keep a number")

    def _check_tensors(self) -> None:
        if _identities(self._tensors()) != self._identities:
            raise RuntimeError(
                "cuda_graph: parameters or the optimizer's state are other tensors than those captured, or were frozen "
                "or unfrozen since: build a new CapturedMetaStep after such a change"
            )


def _load(buffers: Sequence[TaskBatch], batches: Sequence[TaskBatch]) -> None:
    """Copy batches of the same kind into the graph's own memory."""
    if len(batches) != len(buffers):
        raise ValueError(
            f"batch: expected {len(buffers)} meta-batches as captured, got {len(batches)}: "
            "another number needs another CapturedMetaStep"
        )
    pairs = []
    for own, batch in zip(buffers, batches):
        for part, into, values in zip(TaskBatch._fields, own, batch, strict=True):
            for name, buffer, X in zip(Examples._fields, into, values, strict=True):
                if (X.shape, X.dtype, X.device) != (buffer.shape, buffer.dtype, buffer.device):
                    raise ValueError(
                        f"batch.{part}.{name}: expected {_kind(buffer)} as captured, got {_kind(X)}: "
                        "another shape needs another CapturedMetaStep"
                    )
                pairs.append((buffer, X))
    for buffer, X in pairs:
        buffer.copy_(X)


@contextmanager
def undone(learner: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Sets back what the block does to parameters, buffers, optimizer and random states: in place, to the bit.

    A state that the optimizer has not had before becomes zeros, which is how those of a `MetaStep` start. Gradients of
    its parameters are none afterwards.
    """
    tensors = [*learner.parameters(), *learner.buffers()]
    before = [X.detach().clone() for X in tensors]
    states = {p: {name: X.clone() for name, X in state.items()} for p, state in optimizer.state.items()}
    on_cuda = {X.device for X in tensors if X.device.type == "cuda"}
    with torch.random.fork_rng(devices=on_cuda, device_type="cuda"):
        try:
            yield
        finally:
            optimizer.zero_grad()
            with torch.no_grad():
                for X, value in zip(tensors, before, strict=True):
                    X.copy_(value)
                for p, state in optimizer.state.items():
                    for name, X in state.items():
                        if p in states:
                            X.copy_(states[p][name])
                        else:
                            X.zero_()


def _checked_device(X: Tensor, device: torch.device) -> Tensor:
    if X.device != device:
        raise ValueError(f"batch: expected tensors on {device} as the learner is, got one on {X.device}")
    return X


def _identities(tensors: list[Tensor]) -> list[tuple[int, bool]]:
    return [(X.data_ptr(), X.requires_grad) for X in tensors]


def _kind(X: Tensor) -> str:
    return f"{tuple(X.shape)} {X.dtype} on {X.device}"
