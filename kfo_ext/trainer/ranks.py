"""The processes of one training, called ranks: which tasks each takes, what they add up, and how they end together."""

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

# How long a rank waits for another one that is silent. One that ends, however it ends, is noticed at once by gloo.
TIMEOUT = timedelta(minutes=10)


class LostRank(ConnectionError):
    """Another rank has ended, or was silent for too long."""


class Ranks:
    """The members of a process group, in its order; without a group, this process alone.

    Each function but `own` and `part` waits for all ranks, and is called by all of them in the same order.

    Raises: LostRank (each of them) where another rank has ended, or was silent for the group's timeout.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's part of so many items in order; the parts differ by one item at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def own(self, batch: TaskBatch) -> tuple[TaskBatch, float]:
        """This rank's tasks of a meta-batch, and their share of it.

        Raises: ValueError for fewer tasks than ranks.
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
        """The largest of the ranks' numbers.

        device: on which the group communicates.
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
        """What the first rank makes, which the others wait for."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.first else None]
        with _answered(self.rank):
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the first one's values: another processor may have drawn others in the last digit."""
        if self.size == 1:
            return
        for X in tensors:
            # As it lies in memory: gloo takes no other.
            copy = X.detach().contiguous()
            with _answered(self.rank):
                dist.broadcast(copy, group=self.group, group_src=0)
            X.detach().copy_(copy)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError naming the first rank and fact that differ from those of rank 0."""
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

        Raises: ValueError for a numbered device, which all ranks would share.
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
        # Without the place in gloo's sources, and its advice.
        reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
        raise LostRank(
            f"rank {rank}: another rank has ended, or was silent for too long; the run can go on from its last "
            f"checkpoint ({reason})"
        ) from error


@contextmanager
def joined() -> Iterator[ProcessGroup | None]:
    """The group of the processes that torchrun started with this one, until the block ends; None for one process.

    The store that torchrun gives decides who says why all ranks end: the first that fails. gloo on the CPU, nccl on
    CUDA devices.

    Raises: Unsaid in place of any error, once another rank has said why it ends.
    """
    if not of_several():
        yield None
        return
    shared, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # The store outlives a restart: under one name for all, ranks would find the addresses of those that are gone.
    store = dist.PrefixStore(f"kfo-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{size}", shared)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        with _answered(rank):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield dist.group.WORLD
    except BaseException:
        # The process ends now: closing the group in order would wait for ranks that are gone.
        if not _first_to_end(store):
            raise Unsaid from None
        raise
    dist.destroy_process_group()


def restarts() -> bool:
    """Whether torchrun starts the ranks again when one fails (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _first_to_end(store: dist.Store) -> bool:
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        # The store is gone with its rank: better twice than not at all.
        return True
