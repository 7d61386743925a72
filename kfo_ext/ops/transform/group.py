"""The shapes of a ragged group of Kronecker problems, their factors, and the sizes of packed rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kfo_ext.ops.transform.checks import Columns
from kfo_ext.ops.transform.one_sided import BOTH, ONLY_L, ONLY_R, SIDES, OneSided


def _triple(i: int, shape: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shapes[{i}]: expected three integers (B, p, q), got {shape!r}")
    if min(shape) < 1:
        raise ValueError(f"shapes[{i}]: expected B, p and q of at least 1, got {tuple(shape)}")
    return shape[0], shape[1], shape[2]


class Group:
    """A ragged group of problems: (B, p, q) of each, and the number of elements of each operand's packed row.

    Args:
        shapes: (B, p, q) triples: B matrices of shape (p, q) that share factors R (p, p) and L (q, q).
        names: names of the problems, for messages; by default their positions.
        sides: the factors that each problem has, "RL", "R" or "L"; by default both. An absent factor has no columns in
            a packed row, and is the identity.

    Raises:
        TypeError: a shape is not three integers.
        ValueError: B, p or q is less than 1, a packed row would have 2**63 elements or more, or a side is unknown.
    """

    def __init__(
        self,
        shapes: Iterable[tuple[int, int, int]],
        names: Sequence[str] | None = None,
        sides: Iterable[str] | None = None,
    ) -> None:
        self.shapes = tuple(_triple(i, shape) for i, shape in enumerate(shapes))
        self.sides = (BOTH,) * len(self.shapes) if sides is None else tuple(sides)
        if len(self.sides) != len(self.shapes) or not all(side in SIDES for side in self.sides):
            raise ValueError(f"sides: expected {' or '.join(SIDES)} for each of {len(self.shapes)}, got {self.sides}")
        self.flat = [size for shape in self.shapes for size in shape]
        self.columns = Columns(self.shapes, *self._sums(names))
        # None if all problems have both factors, the usual case.
        self.one_sided = None if set(self.sides) <= {BOTH} else OneSided(self.shapes, self.sides)

    def _sums(self, names: Sequence[str] | None) -> tuple[int, int, int, int]:
        """The number of elements of a row of R, G, L and the bias."""
        sums = {"R": 0, "G": 0, "L": 0, "bias": 0}
        for i, ((B, p, q), side) in enumerate(zip(self.shapes, self.sides)):
            size_R, size_L = 0 if side == ONLY_L else p * p, 0 if side == ONLY_R else q * q
            for operand, size in (("R", size_R), ("G", B * p * q), ("L", size_L), ("bias", p * q)):
                sums[operand] += size
                # torch's limit.
                if sums[operand] >= 2**63:
                    raise ValueError(
                        f"{f'shapes[{i}]' if names is None else f'parameter {names[i]!r}'}: "
                        f"expected rows of fewer than 2**63 elements, "
                        f"but with (B, p, q) = {(B, p, q)} that of {operand} has {sums[operand]}: remove it"
                    )
        return sums["R"], sums["G"], sums["L"], sums["bias"]

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        sides = "" if self.one_sided is None else f", sides={list(self.sides)}"
        return f"{type(self).__name__}({list(self.shapes)}{sides})"
