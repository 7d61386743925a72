"""The ragged group of Kronecker problems of a list of parameters.

A parameter W is B matrices of shape (p, q) that share one pair of factors R (p, p), L (q, q):

    linear weight (out, in)          B = 1      p = out   q = in
    bias, batch norm (n)             B = 1      p = n     q = 1
    conv weight (out, in, *kernel)   B = out    p = in    q = the product of the kernel: 1, 2 or 3 dimensions
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kfo_ext.ops.transform.group import Group
from kfo_ext.ops.transform.one_sided import ONLY_L, ONLY_R
from kfo_ext.packing import NO_PARAMETERS, Packing


def problem_shape(shape: torch.Size, name: str = "parameter") -> tuple[int, int, int]:
    """Return (B, p, q) of one parameter.

    Args:
        shape: the parameter's shape.
        name: its name, for messages.

    Returns:
        B matrices of shape (p, q).

    Raises:
        ValueError: the parameter has no elements, no dimension or more than 5.
    """
    if 0 in shape:
        raise ValueError(f"parameter {name!r}: expected at least one element, got shape {tuple(shape)}")
    if len(shape) == 1:
        return 1, shape[0], 1
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if 3 <= len(shape) <= 5:
        return shape[0], shape[1], shape[2:].numel()
    raise ValueError(
        f"parameter {name!r}: expected 1 (bias, normalisation), 2 (linear) or 3 to 5 (convolution) dimensions, "
        f"got {len(shape)}: {tuple(shape)}; only=[...] of KFO and LowRank leaves it to gradient descent, "
        "ByName(parameters, {name: MetaSGD, ...}) gives it another update"
    )


class Problems(Group):
    """The group: one (B, p, q) per parameter, and the packing of rows of G, R, L and the bias term.

    Args:
        shapes: (B, p, q) triples.
        packing: how gradients are packed; by default one (B, p, q) tensor per problem.
        sides: the factors that each problem has, "RL", "R" or "L"; by default both. An absent factor has shape (0, 0)
            in `R` or `L` and packs as None: the map is then G L or R^T G.

    Raises:
        TypeError: a shape is not three integers.
        ValueError: B, p or q is less than 1, a packed row would have 2**63 elements or more, or a side is unknown.
    """

    def __init__(
        self,
        shapes: Iterable[tuple[int, int, int]],
        packing: Packing | None = None,
        sides: Iterable[str] | None = None,
    ) -> None:
        super().__init__(shapes, None if packing is None else packing.names, sides)
        if packing is None:
            names = [str(i) for i in range(len(self.shapes))]
            packing = Packing(names, [torch.Size(shape) for shape in self.shapes], named=False)
        self.packing = packing
        sizes_R = [0 if side == ONLY_L else p for side, (_, p, _) in zip(self.sides, self.shapes)]
        sizes_L = [0 if side == ONLY_R else q for side, (_, _, q) in zip(self.sides, self.shapes)]
        self.R, self.L = (Packing(packing.names, [torch.Size((n, n)) for n in sizes]) for sizes in (sizes_R, sizes_L))
        self.bias = Packing(packing.names, [torch.Size((p, q)) for _, p, q in self.shapes])

    @classmethod
    def of(cls, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> Problems:
        """Build the group of parameters, in their order.

        Args:
            parameters: tensors or (name, tensor) pairs.

        Returns:
            The group.

        Raises:
            ValueError: there is no parameter, or one that is not a bias, linear or convolution weight.
            TypeError: an entry is neither a tensor nor a (name, tensor) pair.
        """
        packing = Packing.of(parameters)
        if not len(packing):
            raise ValueError(NO_PARAMETERS)
        return cls([problem_shape(shape, name) for name, shape in zip(packing.names, packing.shapes)], packing)
