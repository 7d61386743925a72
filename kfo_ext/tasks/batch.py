"""Meta-batches: what a task family yields, how a user makes one, and the random numbers behind them."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Examples(NamedTuple):
    """Labelled examples of T tasks.

    x: (T, n, ...) inputs; images are (T, n, C, H, W) float32 in [0, 1]
    y: (T, n) int64 labels, or (T, n, d) regression targets
    """

    x: Tensor
    y: Tensor


class TaskBatch(NamedTuple):
    """One meta-batch: every tensor has the leading task dimension T.

    support: the examples a task adapts on, ways * shots of them for classification
    query: the examples that judge the adapted parameters, ways * queries of them
    """

    support: Examples
    query: Examples

    @classmethod
    def of(cls, support: Sequence[tuple[Tensor, Tensor]], query: Sequence[tuple[Tensor, Tensor]]) -> TaskBatch:
        """The meta-batch of tasks that are given one by one.

        support: a pair (x, y) per task, all of one shape: x (n, ...), y (n,) int64 labels or (n, d) targets
        query: a pair per task alike; it may have another n

        Raises: ValueError or TypeError naming the task whose tensors do not fit the first task's.
        """
        if len(support) != len(query) or not support:
            raise ValueError(
                f"query: expected a pair (x, y) for each task of support, at least one, got {len(query)} for "
                f"{len(support)}"
            )
        return cls(_stacked("support", support), _stacked("query", query))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """The batch on another device, its floating tensors in another dtype (integer labels keep theirs)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return TaskBatch(*(Examples(move(part.x), move(part.y)) for part in self))

    def split(self, tasks: int) -> list[TaskBatch]:
        """Batches of so many tasks each, the last of what is left."""
        tensors = [tensor.split(tasks) for part in self for tensor in part]
        return [TaskBatch(Examples(*each[:2]), Examples(*each[2:])) for each in zip(*tensors)]


class TaskFamily(Protocol):
    """Where tasks come from: a pure function of its constructor's arguments, `index` and `tasks`.

    A class may also define, together with sample, two halves of it: sample(index, tasks) == batch(draw(index, tasks)).
    Workers then call draw alone, which stays on the CPU, and the thread that takes the stream calls batch: what that
    does on a device goes to this thread's current stream, and no worker disturbs a CUDA graph's capture. Of a family
    without them workers call sample; on a device that would use the worker's own current stream, the device's default.
    """

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`, of `tasks` tasks."""
        ...


def _stacked(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Examples:
    for task, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(one, Tensor) for one in pair):
            raise TypeError(f"{name}[{task}]: expected a pair (x, y) of tensors, got {type(pair).__name__}")
        x, y = pair
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise ValueError(f"{name}[{task}]: expected a label for each input, got {x.shape} and {y.shape}")
        for part, one, first in zip("xy", pair, pairs[0]):
            if (one.shape, one.dtype, one.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"{name}[{task}]: expected {part} like the first task's, {tuple(first.shape)} {first.dtype} on "
                    f"{first.device}, got {tuple(one.shape)} {one.dtype} on {one.device}"
                )
    return Examples(*(torch.stack(parts) for parts in zip(*pairs)))


def generator_for(seed: int, *stream: int | str) -> torch.Generator:
    """A fresh CPU generator for one named stream, seeded by a hash that no platform or process changes.

    seed: the run's seed
    stream: what tells this stream from the others, say a split's name and an index

    torch seeds the CPU generator with 32 bits: among n streams about n^2 / 2^33 pairs coincide.
    """
    digest = hashlib.blake2b(repr((operator.index(seed), *stream)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
