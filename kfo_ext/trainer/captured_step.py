"""A meta-iteration captured as one CUDA graph and replayed for every batch."""

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

# The first creates handles, workspaces, scratch memory and the optimizer's state; torch's recipe has two more.
WARMUPS = 3


class Recorder(Protocol):
    """Prepares and records an iteration."""

    def warm_up(self, iterate: Callable[[], object], times: int) -> None:
        """Run the iteration `times` times in the context in which it will be recorded."""
        ...

    def record(self, iterate: Callable[[], MetaReport]) -> tuple[Callable[[], object], MetaReport]:
        """A replay, and the report that each replay overwrites."""
        ...


class GraphRecorder:
    """Captures CUDA graphs, on its own stream.

    Args:
        device: the device of the graphs.

    Raises:
        ValueError: it is not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"cuda_graph: expected a learner on a CUDA device, got one on {device}")
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, iterate: Callable[[], object], times: int) -> None:
        """Run the iteration on the capture's stream, since autograd ties a parameter's state to a stream."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(times):
                        iterate()
            finally:
                torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, iterate: Callable[[], MetaReport]) -> tuple[Callable[[], object], MetaReport]:
        """Capture one iteration.

        Args:
            iterate: the iteration.

        Returns:
            The replay, and the report that each replay overwrites.

        Raises:
            RuntimeError: the iteration cannot be captured; the message gives the first reason.
        """
        # An uncollected cycle (an autograd graph of another stream) would end the capture when it is freed.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        # Threads that prepare tasks may use the device meanwhile: only this thread must obey the capture's rules.
        mode = "thread_local"
        first: list[BaseException] = []
        try:
            with (
                torch.cuda.device(self.device),
                # A failed capture leaves its stream current: this restores the caller's stream.
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode),
            ):
                try:
                    report = iterate()
                except BaseException as error:
                    # Ending a broken capture raises another, uninformative error.
                    first.append(error)
                    raise
        except Exception as error:
            reason = first[0] if first else error
            raise RuntimeError(f"cuda_graph: the meta-iteration cannot be captured: {reason}") from reason
        return graph.replay, report


class CapturedMetaStep(MetaStep):
    """A `MetaStep` that the first call captures and every call replays: one launch for a whole meta-iteration.

    The first call warms up on its batch and undoes that in place: the iterations equal those of a `MetaStep`. Shapes,
    types, the inner rate and everything else except the batch and the outer rate are fixed from then on. A report and
    the meta-gradients in `grad` lie in the graph's memory, and are valid until the next call. A batch of another shape
    is refused, not captured again: a meta-batch has one shape, and every graph keeps the memory of a whole iteration.

    Args:
        learner: as for `MetaStep`.
        optimizer: as for `MetaStep`; the rate of every group is a tensor, as `outer_rate` makes it.
        clip_norm: as for `MetaStep`.
        recorder: captures; by default a CUDA graph.

    Raises:
        ValueError: as `MetaStep`; or the learner is not on a CUDA device, recomputes its inner steps (which saves the
            random state, and a capture cannot read it), or a rate is not a tensor.
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
        # The batches in the graph's own memory, the replay, and the report that it writes.
        self._captured: tuple[list[TaskBatch], Callable[[], object], MetaReport] | None = None
        # Held so that no other tensor is allocated at their addresses.
        self._held: list[Tensor] = []
        self._identities: list[tuple[int, bool]] = []
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, batch: TaskBatch | Sequence[TaskBatch], rate: float) -> MetaReport:
        """Take one meta-step, as `MetaStep` does.

        Args:
            batch: as for `MetaStep`.
            rate: as for `MetaStep`.

        Returns:
            As `MetaStep`, in the graph's memory.

        Raises:
            ValueError: as `MetaStep`, or the number, shape, type or device of the batches differs from the first ones.
            RuntimeError: the iteration cannot be captured, or parameters or the optimizer's state were frozen or
                replaced by other tensors since.
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
        # Only Adam's groups have it.
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        before = [group["capturable"] for group in groups]
        for group in groups:
            # A fused Adam is the same either way; torch requires the flag in a capture, and warns of it elsewhere.
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
        """All tensors that the graph reads and writes by address, except the batch."""
        states = self.optimizer.state
        parameters = self._parameters()
        # In the order of the parameters: states are in the order of their first steps.
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
    """Undo the block's changes to parameters, buffers, optimizer and random states: in place and bitwise.

    An optimizer state created in the block becomes zeros, the initial state of a `MetaStep`. The gradients of the
    optimizer's parameters are None afterwards.

    Args:
        learner: its parameters and buffers are restored.
        optimizer: its state is restored.

    Yields:
        Nothing; the block may change all of these.
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
