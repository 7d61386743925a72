"""Meta-batches, the interface of a task family, and the random generators of task streams."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kfo_ext.tasks.checks import check_count

Pairs = Sequence[tuple[Tensor, Tensor]]


class Examples(NamedTuple):
    """Labelled examples of T tasks.

    Attributes:
        x: (T, n, ...) inputs; images are (T, n, C, H, W) float32 in [0, 1].
        y: (T, n) int64 labels, or (T, n, d) regression targets.
    """

    x: Tensor
    y: Tensor


class TaskBatch(NamedTuple):
    """One meta-batch: every tensor has the leading task dimension T.

    Attributes:
        support: the examples a task adapts on, ways * shots of them for classification.
        query: the examples that judge the adapted parameters, ways * queries of them.
    """

    support: Examples
    query: Examples

    @classmethod
    def of(cls, pairs: Pairs, query: Pairs | None = None, *, shots: int | None = None) -> TaskBatch:
        """Build the meta-batch of separate tasks, all of one shape.

        Args:
            pairs: a pair (x, y) per task: x (n, ...), y (n,) int64 labels or (n, d) targets.
            query: a pair per task in the same form, possibly with another n; `pairs` are then the support examples.
            shots: instead of `query`: the first `shots` examples of each class of a task are its support (for targets
                the first `shots` points), the others its query.

        Returns:
            The meta-batch.

        Raises:
            ValueError: the tensors of a task, which is named, do not fit the first task's, a class has too few
                examples, or not exactly one of `query` and `shots` is given.
            TypeError: a task is not a pair of tensors.
        """
        if (query is None) == (shots is None):
            raise ValueError(
                "query, shots: expected one of them, query examples or the number of support examples; for a list of "
                "pairs (support, query), call TaskBatch.of(*zip(*tasks))"
            )
        if shots is not None:
            check_count("shots", shots, 1)
            parted = [_parted(f"pairs[{task}]", pair, shots) for task, pair in enumerate(pairs)]
            pairs, query = [support for support, _ in parted], [rest for _, rest in parted]
        if query is None or len(pairs) != len(query) or not pairs:
            raise ValueError(
                f"query: expected a pair (x, y) for each task, and at least one task, got {len(query or ())} for "
                f"{len(pairs)}"
            )
        return cls(_stacked("pairs", pairs), _stacked("query", query))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """The batch on another device, its floating tensors in another dtype (integer labels keep theirs)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return TaskBatch(*(Examples(move(part.x), move(part.y)) for part in self))

    def split(self, tasks: int) -> list[TaskBatch]:
        """Batches of `tasks` tasks each; the last one may be smaller."""
        tensors = [tensor.split(tasks) for part in self for tensor in part]
        return [TaskBatch(Examples(*each[:2]), Examples(*each[2:])) for each in zip(*tensors)]


class TaskFamily(Protocol):
    """A source of tasks: a pure function of its constructor's arguments, `index` and `tasks`.

    A class may also define the two halves of sample: sample(index, tasks) == batch(draw(index, tasks)). Workers then
    call only draw, which stays on the CPU, and the consumer's thread calls batch: its work on a device is queued on
    this thread's current stream, and no worker disturbs a CUDA graph's capture. For a family without the halves,
    workers call sample; on a device this would use the worker's own current stream, the device's default.
    """

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`, of `tasks` tasks."""
        ...


def _stacked(name: str, pairs: Pairs) -> Examples:
    for task, pair in enumerate(pairs):
        _check_pair(f"{name}[{task}]", pair)
        for part, one, first in zip("xy", pair, pairs[0]):
            if (one.shape, one.dtype, one.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"{name}[{task}]: expected {part} like the first task's, {tuple(first.shape)} {first.dtype} on "
                    f"{first.device}, got {tuple(one.shape)} {one.dtype} on {one.device}"
                )
    return Examples(*(torch.stack(parts) for parts in zip(*pairs)))


def _parted(name: str, pair: tuple[Tensor, Tensor], shots: int) -> tuple[Examples, Examples]:
    """The first `shots` examples of each class, and the others, both in their original order."""
    x, y = _check_pair(name, pair)
    classes = y if y.dim() == 1 and not y.is_floating_point() else torch.zeros(len(y), device=y.device)
    # The number of preceding examples of the same class.
    before = (classes.unsqueeze(1) == classes).tril(-1).sum(1)
    support = before < shots
    counts = classes.unique(return_counts=True)[1]
    least = int(counts.min()) if len(counts) else 0
    if least <= shots:
        raise ValueError(f"{name}: expected more than shots = {shots} examples of each class, got {least} of one")
    return Examples(x[support], y[support]), Examples(x[~support], y[~support])


def _check_pair(name: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(one, Tensor) for one in pair):
        got = type(pair).__name__
        if isinstance(pair, (tuple, list)):
            got += f" of ({', '.join(type(one).__name__ for one in pair)}): join several inputs in one tensor x"
        raise TypeError(f"{name}: expected a pair (x, y) of tensors, got {got}")
    x, y = pair
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(f"{name}: expected a label for each input, got {tuple(x.shape)} and {tuple(y.shape)}")
    return x, y


def generator_for(seed: int, *stream: int | str) -> torch.Generator:
    """Make a CPU generator for one named stream, seeded by a hash that is the same on all platforms.

    torch seeds the CPU generator with 32 bits: among n streams about n^2 / 2^33 pairs coincide.

    Args:
        seed: the run's seed.
        *stream: the name of this stream, such as a split's name and an index.

    Returns:
        The generator.
    """
    digest = hashlib.blake2b(repr((operator.index(seed), *stream)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
