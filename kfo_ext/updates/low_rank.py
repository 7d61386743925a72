"""The low-rank Cholesky update: a learned A of few columns instead of a full matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfo_ext.ops.operands import in_one_dtype
from kfo_ext.packing import Packing, listed
from kfo_ext.problems import problem_shape
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import check_count, check_packed, named_alike
from kfo_ext.updates.covered import Covered, matching


class Elements(NamedTuple):
    """The number of elements in the maps of some parameters.

    Attributes:
        learned: elements of A, which is meta-learned.
        stored: including the frozen start of A.
        kronecker: of R and L of a one-layer KFO for the same parameters: p^2 + q^2 each.
        full: of the full matrix, n^2 for a parameter of n elements.
    """

    learned: int
    stored: int
    kronecker: int
    full: int


class LowRank(Update):
    """U(g) = g + A A^T g - A0 A0^T g, with a learned A (n, rank) and A0, its frozen random start, where U(g) = g.

    By default each side has its own A: U(G) = S_R G S_L, where G is B matrices (p, q) as for `KFO` and
    S = I + A A^T - A0 A0^T of size p or q. A side of length 1 has none. With `whole_layer` A has a row for each element
    of a parameter: n = B p q.

    The columns of A start as random vectors of about unit length. A0 is a buffer: without it A means nothing, so a
    state that holds only one of them is refused.

    Args:
        parameters: the tensors to update, or (name, tensor) pairs such as `model.named_parameters()`.
        rank: columns of A; no more than the shortest side.
        whole_layer: one A for all elements of a parameter, instead of one for each side.
        only: names of the parameters that get an A, or patterns such as "head.*" (fnmatch); the rest follows gradient
            descent, U(g) = g. None: all.

    Raises:
        ValueError: there are no parameters, a shape is not supported, devices are mixed, a pattern matches no
            parameter, the rank is less than 1 or greater than a side, or no side is longer than 1.
        TypeError: an entry is not a tensor, parameters are not floating point of one dtype, or an option has another
            type.

    Source:
        paper, appendix C.1 (the low-rank Cholesky factorization). Its A A^T cannot be the identity if rank < n: the
        difference from the start is this package's choice.
    """

    start: Tensor

    def __init__(
        self,
        parameters: Iterable[Tensor | tuple[str, Tensor]],
        *,
        rank: int,
        whole_layer: bool = False,
        only: Iterable[str] | None = None,
    ) -> None:
        parameters = listed(parameters, "parameters", pairs=True)
        super().__init__(parameters)
        like = named_alike(parameters)[0][1]
        self.rank = check_count("rank", rank, "the number of columns of A")
        if not isinstance(whole_layer, bool):
            raise TypeError(f"whole_layer: expected True or False, got {whole_layer!r}")
        self.whole_layer = whole_layer
        packing = self.packing
        wanted = range(len(packing)) if only is None else matching(packing.names, only, "only")
        shapes = [problem_shape(packing.shapes[i], packing.names[i]) for i in wanted]
        if whole_layer:
            shapes = [(1, B * p * q, 1) for B, p, q in shapes]
        # (parameter, axis, length of the side): axis 2 for p, 3 for q of (tasks, B, p, q).
        sides = [
            (i, axis, shape[axis - 1]) for i, shape in zip(wanted, shapes) for axis in (2, 3) if shape[axis - 1] > 1
        ]
        if not sides:
            raise ValueError("parameters: expected one with a side longer than 1, got none; use GradientDescent")
        for i, _, side in sides:
            if rank > side:
                raise ValueError(
                    f"rank: expected at most {side}, the {'size' if whole_layer else 'shorter side'} of parameter "
                    f"{packing.names[i]!r} of shape {tuple(packing.shapes[i])}, got {rank}; give a smaller "
                    "rank, use KFO, which is smaller there, or leave the parameter out by only=[...]"
                )
        triples = dict(zip(wanted, shapes))
        self.covered = Covered(packing, sorted({i for i, _, _ in sides}))
        self._shapes = [triples[i] for i in self.covered.indices]
        # The position of each A in a packed row, and the axes of each covered parameter.
        self._A = Packing([packing.names[i] for i, _, _ in sides], [torch.Size((side, rank)) for _, _, side in sides])
        self._axes = [[axis for j, axis, _ in sides if j == i] for i in self.covered.indices]
        pieces = [torch.randn(side, rank, dtype=like.dtype, device=like.device) / side**0.5 for _, _, side in sides]
        start = torch.cat([piece.reshape(1, -1) for piece in pieces], 1)
        self.A = nn.Parameter(start.clone())
        self.register_buffer("start", start)

    @property
    def phi(self) -> Phi:
        """A of all sides, packed (1, n)."""
        return (self.A,)

    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """Compute U(g).

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi or G has another shape.
            TypeError: there are several dtypes outside autocast.
        """
        check_packed("LowRank", phi, self.phi, G, self.packing.numel)
        operands = {"G": G, "phi": phi[0], "start": self.start}
        return in_one_dtype(lambda G, A, A0: self.covered.rule(lambda X: self._covered_rule(X, A, A0), G), operands)

    def _covered_rule(self, G: Tensor, A: Tensor, A0: Tensor) -> Tensor:
        """`rule` of the covered parameters' columns."""
        packing = self.covered.packing
        As, A0s = iter(self._A.unpack(A)), iter(self._A.unpack(A0))
        updates: list[Tensor | None] = []
        for X, (B, p, q), shape, axes in zip(packing.unpack(G), self._shapes, packing.shapes, self._axes):
            U = X.reshape(len(G), B, p, q)
            for axis in axes:
                # The difference first: at the start it is exactly zero.
                U = U + (_project(next(As), U, axis) - _project(next(A0s), U, axis))
            updates.append(U.reshape(len(G), *shape))
        return packing.join(updates, len(G))

    def memory(self) -> Elements:
        """The size of the covered parameters' maps, and of Kronecker and full maps in comparison."""
        numels = [shape.numel() for shape in self.covered.packing.shapes]
        sides = [problem_shape(shape)[1:] for shape in self.covered.packing.shapes]
        return Elements(
            self._A.numel, 2 * self._A.numel, sum(p * p + q * q for p, q in sides), sum(n * n for n in numels)
        )

    def options(self) -> dict[str, Any]:
        """The options of A, and which parameters have one."""
        covered = [i in self.covered.indices for i in range(len(self.packing))]
        return {"covered": covered, "rank": self.rank, "whole_layer": self.whole_layer}

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """As in `Update`; also raises ValueError for A without its start, or the start alone."""
        if (prefix + "A" in state_dict) != (prefix + "start" in state_dict):
            lacks, has = ("start", "A") if prefix + "A" in state_dict else ("A", "start")
            raise ValueError(
                f"state_dict: expected {prefix}A and {prefix}start, of which one without the other means "
                f"nothing, got {has} without {lacks}"
            )
        super().check_state(state_dict, prefix)

    def extra_repr(self) -> str:
        """The number of parameters that have an A, and the rank."""
        return f"parameters={len(self.covered.indices)} of {len(self.packing)}, rank={self.rank}"


def _project(A: Tensor, X: Tensor, axis: int) -> Tensor:
    """A A^T X along an axis of X (tasks, B, p, q); A: (tasks or 1, side, rank)."""
    # einsum does not copy shared factors to each task; matmul does.
    if axis == 2:
        return torch.einsum("tkr,tbrq->tbkq", A, torch.einsum("tkr,tbkq->tbrq", A, X))
    return torch.einsum("tkr,tbpr->tbpk", A, torch.einsum("tkr,tbpk->tbpr", A, X))
