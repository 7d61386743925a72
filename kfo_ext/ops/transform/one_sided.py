"""Groups with problems that lack a factor: nothing of that factor's size is stored or multiplied.

    without L   Y = R^T G          without R   Y = G L

The problems with both factors are one call of the operator. A problem that lacks one is a product of two operands, for
which torch has the derivatives of every order. Its bits may depend on the number of threads, as torch's do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from kfo_ext.ops.parts import Parts

Shape = tuple[int, int, int]
# A function of operands R, G, L and flat (B, p, q) triples of problems that have both factors.
Product = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]

BOTH, ONLY_R, ONLY_L = SIDES = ("RL", "R", "L")
# The label of the problems that have both factors.
_WHOLE = -1


class OneSided:
    """Computes packed rows of such a group.

    Args:
        shapes: (B, p, q) of every problem.
        sides: the factors of every problem: "RL", "R" or "L".
    """

    def __init__(self, shapes: Sequence[Shape], sides: Sequence[str]) -> None:
        labelled = [(_WHOLE if side == BOTH else i, side, shape) for i, (side, shape) in enumerate(zip(sides, shapes))]
        self.problems = [(label, side, shape) for label, side, shape in labelled if label != _WHOLE]
        self.flat = [size for label, _, shape in labelled if label == _WHOLE for size in shape]
        self.G = Parts([label for label, *_ in labelled], [B * p * q for B, p, q in shapes])
        with_R = [(label, p * p) for label, side, (_, p, _) in labelled if side != ONLY_L]
        with_L = [(label, q * q) for label, side, (_, _, q) in labelled if side != ONLY_R]
        self.R, self.L = (Parts([label for label, _ in has], [size for _, size in has]) for has in (with_R, with_L))

    def compute(self, product: Product, R: Tensor, G: Tensor, L: Tensor, *, adjoint: bool) -> Tensor:
        """R^T G L of every problem, or with `adjoint` R G L^T; an absent factor is the identity."""
        Rs, Gs, Ls = self.R.apart(R) if self.R.labels else {}, self.G.apart(G), self.L.apart(L) if self.L.labels else {}
        done: dict[Hashable, Tensor]
        done = {_WHOLE: product(Rs[_WHOLE], Gs[_WHOLE], Ls[_WHOLE], self.flat)} if self.flat else {}
        for label, side, (B, p, q) in self.problems:
            X = Gs[label].reshape(len(G), B, p, q)
            if side == ONLY_R:
                factor, equation = Rs[label].reshape(len(R), p, p), "tik,tbkl->tbil" if adjoint else "tki,tbkl->tbil"
            else:
                factor, equation = Ls[label].reshape(len(L), q, q), "tjl,tbkl->tbkj" if adjoint else "tlj,tbkl->tbkj"
            done[label] = torch.einsum(equation, factor, X).reshape(len(G), B * p * q)
        return self.G.together(done)
