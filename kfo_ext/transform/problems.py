"""The ragged group of Kronecker problems that a list of parameters makes.

A parameter W is B matrices of shape (p, q) that share one pair of factors R (p, p), L (q, q):

    linear weight (out, in)          B = 1      p = out   q = in
    bias, batch norm (n)             B = 1      p = n     q = 1
    conv weight (out, in, kh, kw)    B = out    p = in    q = kh * kw
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kfo_ext.transform.checks import Columns
from kfo_ext.transform.packing import Packing, name_parameters


def problem_shape(shape: torch.Size, name: str = "parameter") -> tuple[int, int, int]:
    """(B, p, q) of one parameter.

    Raises:
        ValueError: the parameter has no elements, or a number of dimensions other than 1, 2 or 4.
    """
    if 0 in shape:
        raise ValueError(f"parameter {name!r}: expected at least one element, got shape {tuple(shape)}")
    if len(shape) == 1:
        return 1, shape[0], 1
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 4:
        return shape[0], shape[1], shape[2] * shape[3]
    raise ValueError(
        f"parameter {name!r}: expected 1 (bias, normalisation), 2 (linear) or 4 (convolution) dimensions, "
        f"got {len(shape)}: {tuple(shape)}"
    )


def _triple(i: int, shape: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shapes[{i}]: expected three integers (B, p, q), got {shape!r}")
    if min(shape) < 1:
        raise ValueError(f"shapes[{i}]: expected B, p and q of at least 1, got {tuple(shape)}")
    return shape[0], shape[1], shape[2]


def _check_rows(shapes: Sequence[tuple[int, int, int]], packing: Packing | None) -> None:
    """Raises ValueError at the shape with which a packed row has more elements than torch counts."""
    sums = {"R": 0, "L": 0, "G": 0}
    for i, (B, p, q) in enumerate(shapes):
        for operand, size in (("R", p * p), ("L", q * q), ("G", B * p * q)):
            sums[operand] += size
            if sums[operand] >= 2**63:
                what = f"shapes[{i}]" if packing is None else f"parameter {packing.names[i]!r}"
                raise ValueError(
                    f"{what}: expected rows of fewer than 2**63 elements, "
                    f"but with (B, p, q) = {(B, p, q)} that of {operand} has {sums[operand]}: leave it out"
                )


class Problems:
    """The group: one (B, p, q) per parameter, and the sizes of the packed rows of R, G, L and the bias term.

    Args:
        shapes: (B, p, q) triples.
        packing: how gradients are packed; by default one (B, p, q) tensor per problem.

    Raises:
        TypeError: a shape is not three integers.
        ValueError: B, p or q is less than 1, or a packed row would have 2**63 elements or more.
    """

    def __init__(self, shapes: Iterable[tuple[int, int, int]], packing: Packing | None = None) -> None:
        self.shapes = tuple(_triple(i, shape) for i, shape in enumerate(shapes))
        _check_rows(self.shapes, packing)
        self.flat = [size for shape in self.shapes for size in shape]
        if packing is None:
            packing = Packing([str(i) for i in range(len(self.shapes))], [torch.Size(shape) for shape in self.shapes])
        self.packing = packing
        self.R = Packing(packing.names, [torch.Size((p, p)) for _, p, _ in self.shapes])
        self.L = Packing(packing.names, [torch.Size((q, q)) for _, _, q in self.shapes])
        self.bias = Packing(packing.names, [torch.Size((p, q)) for _, p, q in self.shapes])
        self.columns = Columns(self.shapes, self.R.numel, packing.numel, self.L.numel, self.bias.numel)

    @classmethod
    def of(cls, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> Problems:
        """The group of the given parameters, in their order.

        Raises:
            ValueError: there is no parameter, or one that is not a bias, linear or convolution weight.
            TypeError: an entry is neither a tensor nor a (name, tensor) pair.
        """
        named = name_parameters(parameters)
        if not named:
            raise ValueError("parameters: expected at least one parameter, got none")
        shapes = [problem_shape(tensor.shape, name) for name, tensor in named]
        return cls(shapes, Packing.of(named))

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Problems({list(self.shapes)})"
