"""The memory of factors: p^2 + q^2 elements per parameter and layer, checked against the free memory in advance.

An embedding of n words has n^2 elements in R alone. Linux grants more memory than there is and kills the process when
it uses it, so the allocator cannot be relied on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from kfo_ext.machine import available_bytes
from kfo_ext.problems import Problems

# Training takes several times the factors: their gradients, the optimizer's moments, and a copy for each task.
_SHARE = 4
# torch counts the bytes of a tensor in 64 bits, on every device.
_MOST = 2**63 - 1


@contextmanager
def room_for_factors(
    problems: Problems, layers: int, bias: bool, like: Tensor, remedy: str | None = None
) -> Iterator[None]:
    """Check that the factors made in the block fit into memory; the error names the largest parameter.

    Args:
        problems: the parameters that get factors.
        layers: the number of Kronecker layers.
        bias: whether each layer has a bias.
        like: a tensor that gives dtype and device.
        remedy: the remedy in the message; by default KFO's.

    Yields:
        Nothing; the block allocates the factors.

    Raises:
        ValueError: they need more than a quarter of the memory that the device has left, or its allocator failed.
        RuntimeError: an error of the block that is not about memory.
    """  # noqa: DOC501
    elements = problems.R.numel + problems.L.numel + (problems.bias.numel if bias else 0)
    needed = layers * elements * like.element_size()
    left = available_bytes(like.device)
    if needed > (_MOST if left is None else left // _SHARE):
        raise _too_large(problems, layers, needed, left, like, remedy)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise _too_large(problems, layers, needed, left, like, remedy) from error


def _too_large(
    problems: Problems, layers: int, needed: int, left: int | None, like: Tensor, remedy: str | None
) -> ValueError:
    sizes = [R + L for R, L in zip(problems.R.sizes, problems.L.sizes)]
    worst = sizes.index(max(sizes))
    name, shape = problems.packing.names[worst], tuple(problems.packing.shapes[worst])
    sides = [(letter, row.shapes[worst]) for letter, row in (("R", problems.R), ("L", problems.L))]
    factors = " and ".join(f"{letter} {tuple(size)}" for letter, size in sides if size.numel())
    longest = max(size[0] for _, size in sides)
    has = "cannot give them" if left is None else f"has {_text(left)} left, of which they may take a quarter"
    remedy = remedy or (
        f"Pass max_factor, less than {longest}: a longer side gets no factor; or only=[...], "
        "without this parameter, which then follows gradient descent; or adapt the head alone (ANIL)"
    )
    return ValueError(
        f"parameter {name!r} of shape {shape}: its factors {factors} need "
        f"{_text(sizes[worst] * like.element_size())}, with the other parameters' and {layers} layers {_text(needed)}, "
        f"but {like.device} {has}. {remedy}"
    )


def _text(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"
