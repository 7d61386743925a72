"""The ragged group of Kronecker problems that a list of parameters makes.

A parameter W is B matrices of shape (p, q) that share one pair of factors R (p, p), L (q, q):

    linear weight (out, in)          B = 1      p = out   q = in
    bias, batch norm (n)             B = 1      p = n     q = 1
    conv weight (out, in, kh, kw)    B = out    p = in    q = kh * kw
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kfo_ext.ops.transform.group import Group
from kfo_ext.packing import Packing, name_parameters


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


class Problems(Group):
    """The group: one (B, p, q) per parameter, and how rows of G, R, L and the bias term are packed.

    Args:
        shapes: (B, p, q) triples.
        packing: how gradients are packed; by default one (B, p, q) tensor per problem.

    Raises:
        TypeError: a shape is not three integers.
        ValueError: B, p or q is less than 1, or a packed row would have 2**63 elements or more.
    """

    def __init__(self, shapes: Iterable[tuple[int, int, int]], packing: Packing | None = None) -> None:
        super().__init__(shapes, None if packing is None else packing.names)
        if packing is None:
            packing = Packing([str(i) for i in range(len(self.shapes))], [torch.Size(shape) for shape in self.shapes])
        self.packing = packing
        self.R = Packing(packing.names, [torch.Size((p, p)) for _, p, _ in self.shapes])
        self.L = Packing(packing.names, [torch.Size((q, q)) for _, _, q in self.shapes])
        self.bias = Packing(packing.names, [torch.Size((p, q)) for _, p, q in self.shapes])

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
