"""The memory of factors: p^2 + q^2 elements for each parameter and layer, compared with what is left beforehand.

An embedding of n words has n^2 elements in R alone. Linux grants more than there is and kills the process when it is
used, so the allocator is not the one to ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from kfo_ext.machine import available_bytes
from kfo_ext.problems import Problems

# torch counts the bytes of a tensor in 64 bits, on every device.
_MOST = 2**63 - 1


@contextmanager
def room_for_factors(problems: Problems, layers: int, bias: bool, like: Tensor) -> Iterator[None]:
    """Makes the factors inside; names the largest parameter where they cannot fit.

    Raises:
        ValueError: they need more than the device has left, or its allocator failed.
    """
    elements = problems.R.numel + problems.L.numel + (problems.bias.numel if bias else 0)
    needed = layers * elements * like.element_size()
    left = available_bytes(like.device)
    if needed > (_MOST if left is None else left):
        raise _too_large(problems, layers, needed, left, like)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise _too_large(problems, layers, needed, left, like) from error


def _too_large(problems: Problems, layers: int, needed: int, left: int | None, like: Tensor) -> ValueError:
    sizes = [p * p + q * q for _, p, q in problems.shapes]
    worst = sizes.index(max(sizes))
    _, p, q = problems.shapes[worst]
    name, shape = problems.packing.names[worst], tuple(problems.packing.shapes[worst])
    has = "cannot give them" if left is None else f"has {_text(left)} left"
    return ValueError(
        f"parameter {name!r} of shape {shape}: its factors R ({p}, {p}) and L ({q}, {q}) need "
        f"{_text(sizes[worst] * like.element_size())}, with the other parameters' and {layers} layers {_text(needed)}, "
        f"but {like.device} {has}. Leave it out: pass KFO the other parameters, freeze this one by "
        "requires_grad_(False), and give the learner allow_nograd=True; or adapt the head alone (ANIL)"
    )


def _text(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"
