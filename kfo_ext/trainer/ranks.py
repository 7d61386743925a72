"""The processes of one training, called ranks: their shares of the tasks, their reductions, and their common end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kfo_ext.tasks import TaskBatch

from .signals import Unsaid, of_several

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")

# How long a rank waits for a silent one. gloo notices immediately when a process ends.
TIMEOUT = timedelta(minutes=10)


class LostRank(ConnectionError):
    """Another rank has ended, or was silent for too long."""


class Ranks:
    """The members of a process group, in its order; without a group, only this process.

    Each method except `own` and `part` waits for all ranks, and must be called by all of them in the same order.

    Args:
        group: the process group, or None.

    Raises:
        LostRank: another rank has ended, or was silent for the group's timeout; in each such method.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's part of `count` items in order; the parts differ by at most one item."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def own(self, batch: TaskBatch) -> tuple[TaskBatch, float]:
        """Select this rank's tasks of a meta-batch.

        Args:
            batch: the whole meta-batch.

        Returns:
            The tasks, and their share of the batch.

        Raises:
            ValueError: there are fewer tasks than ranks.
        """
        if self.size == 1:
            return batch, 1.0
        count = len(batch.support.x)
        if count < self.size:
            raise ValueError(f"batch: expected at least one task for each of {self.size} ranks, got {count}")
        part = self.part(count)
        support, query = (type(examples)(*(X[part] for X in examples)) for examples in batch)
        return TaskBatch(support, query), (part.stop - part.start) / count

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the ranks, by one all-reduce, in the widest of their types; views of one row."""
        flat = torch.cat([X.reshape(-1) for X in tensors])
        with _answered(self.rank):
            dist.all_reduce(flat, group=self.group)
        pieces = flat.split([X.numel() for X in tensors])
        return [piece.view(X.shape).to(X.dtype) for piece, X in zip(pieces, tensors, strict=True)]

    def largest(self, number: int, device: str | torch.device) -> int:
        """Find the largest of the ranks' numbers.

        Args:
            number: this rank's number.
            device: the device on which the group communicates.

        Returns:
            The maximum.
        """
        if self.size == 1:
            return number
        value = torch.tensor(number, device=device)
        with _answered(self.rank):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def gathered(self, value: Value) -> list[Value]:
        """The value of each rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _answered(self.rank):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """The value that the first rank makes; the others wait for it."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.first else None]
        with _answered(self.rank):
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast the first rank's values, since processors may draw values that differ in the last digit."""
        if self.size == 1:
            return
        for X in tensors:
            # Contiguous: gloo accepts no other layout.
            copy = X.detach().contiguous()
            with _answered(self.rank):
                dist.broadcast(copy, group=self.group, group_src=0)
            X.detach().copy_(copy)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError naming the first rank and fact that differ from those of rank 0."""
        first, *others = self.gathered(dict(facts))
        for rank, theirs in enumerate(others, start=1):
            for name in [*first, *theirs]:
                if first.get(name) != theirs.get(name):
                    raise ValueError(
                        f"rank {rank}: {name}: expected {first.get(name)!r} as on rank 0, got {theirs.get(name)!r}; "
                        "start all ranks with the same options, data and versions"
                    )

    def place(self, device: str) -> None:
        """Make 'cuda' the CUDA device of this rank's LOCAL_RANK.

        Args:
            device: the run's device.

        Raises:
            ValueError: the device has a number, so all ranks would share it.
        """
        kind = torch.device(device)
        if self.size == 1 or kind.type != "cuda":
            return
        if kind.index is not None:
            raise ValueError(f"device: expected 'cuda' with {self.size} ranks, each on its own device, got {device!r}")
        if "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def _answered(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Without the position in gloo's sources, and its advice.
        reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
        raise LostRank(
            f"rank {rank}: another rank has ended, or was silent for too long; the run can go on from its last "
            f"checkpoint ({reason})"
        ) from error


@contextmanager
def joined() -> Iterator[ProcessGroup | None]:
    """Join the process group that torchrun started.

    The store that torchrun provides decides which rank reports why all end: the first that fails. Communication is by
    gloo on the CPU and by nccl on CUDA devices.

    Yields:
        The group, until the block ends; None for a single process.

    Raises:
        Unsaid: instead of any error, once another rank has reported its own.
        BaseException: any error of the block, if this rank is the first to fail.
    """
    if not of_several():
        yield None
        return
    shared, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # The store outlives a restart: with a common prefix, ranks would find the addresses of processes that have ended.
    store = dist.PrefixStore(f"kfo-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{size}", shared)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        with _answered(rank):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield dist.group.WORLD
    except BaseException:
        # The process ends now: an orderly shutdown of the group would wait for ranks that have ended.
        if not _first_to_end(store):
            raise Unsaid from None
        raise
    dist.destroy_process_group()


def restarts() -> bool:
    """Whether torchrun restarts the ranks when one fails (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _first_to_end(store: dist.Store) -> bool:
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        # The store has ended with its rank: better to report twice than not at all.
        return True
