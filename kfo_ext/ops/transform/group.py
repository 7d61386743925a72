"""The shapes of a ragged group of Kronecker problems, and the sizes of its packed rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kfo_ext.ops.transform.checks import Columns


def _triple(i: int, shape: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shapes[{i}]: expected three integers (B, p, q), got {shape!r}")
    if min(shape) < 1:
        raise ValueError(f"shapes[{i}]: expected B, p and q of at least 1, got {tuple(shape)}")
    return shape[0], shape[1], shape[2]


class Group:
    """(B, p, q) of every problem, and the elements of one packed row of each operand.

    Args:
        shapes: (B, p, q) triples: B matrices of shape (p, q) that share factors R (p, p) and L (q, q).
        names: of the problems, for messages; by default their positions.

    Raises:
        TypeError: a shape is not three integers.
        ValueError: B, p or q is less than 1, or a packed row would have 2**63 elements or more.
    """

    def __init__(self, shapes: Iterable[tuple[int, int, int]], names: Sequence[str] | None = None) -> None:
        self.shapes = tuple(_triple(i, shape) for i, shape in enumerate(shapes))
        self.flat = [size for shape in self.shapes for size in shape]
        self.columns = Columns(self.shapes, *self._sums(names))

    def _sums(self, names: Sequence[str] | None) -> tuple[int, int, int, int]:
        """Elements of a row of R, G, L and the bias."""
        sums = {"R": 0, "G": 0, "L": 0, "bias": 0}
        for i, (B, p, q) in enumerate(self.shapes):
            for operand, size in (("R", p * p), ("G", B * p * q), ("L", q * q), ("bias", p * q)):
                sums[operand] += size
                # More than torch counts.
                if sums[operand] >= 2**63:
                    raise ValueError(
                        f"{f'shapes[{i}]' if names is None else f'parameter {names[i]!r}'}: "
                        f"expected rows of fewer than 2**63 elements, "
                        f"but with (B, p, q) = {(B, p, q)} that of {operand} has {sums[operand]}: leave it out"
                    )
        return sums["R"], sums["G"], sums["L"], sums["bias"]

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shapes)})"
