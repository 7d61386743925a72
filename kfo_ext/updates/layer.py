"""A Kronecker layer: packed factors for a group of parameters, and the map that they define on packed gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfo_ext.functional import adjoint, transform
from kfo_ext.packing import Packing
from kfo_ext.problems import Problems
from kfo_ext.updates.base import Phi

# R (p, p) and L (q, q) of one parameter; None is the identity, which is not stored.
Pair = tuple["Tensor | None", "Tensor | None"]


class KroneckerLayer(nn.Module):
    """K(g) = R^T g L (+ bias), or with psd R^T R g L^T L (+ bias), for every parameter of a group.

    Args:
        problems: the group; its sides determine which factors there are.
        psd: use R^T R and L^T L instead of R and L, so that the map is symmetric positive semi-definite.
        bias: learn a (p, q) term per parameter, broadcast over B; it starts at 0.
        zero: start R, or L if there is no R, at 0 instead of the identity: the zero map, which still learns because the
            other factor is the identity.
        like: a tensor that gives dtype and device.
        backend: see `kfo_ext.transform`.

    Source:
        paper, appendix C.1; learn2learn's KroneckerTransform is psd by default.
    """

    def __init__(self, problems: Problems, *, psd: bool, bias: bool, zero: bool, like: Tensor, backend: str) -> None:
        super().__init__()
        self.problems = problems
        self.psd = psd
        self.backend = backend
        self.R, self.L = _row(problems.R.numel, like), _row(problems.L.numel, like)
        self.bias = _row(problems.bias.numel, like) if bias else None
        with torch.no_grad():
            for R, L in self.factors():
                # If a problem has only one factor, that factor is the whole map.
                for start, factor in ((0 if zero else 1, R), (0 if zero and R is None else 1, L)):
                    if factor is not None:
                        factor.fill_diagonal_(start)

    @property
    def phi(self) -> Phi:
        """The layer's packed meta-parameters, one row each: R, L and the bias, as far as it has them."""
        return tuple(row for row in (self.R, self.L, self.bias) if row is not None)

    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """Compute K(g) with the given meta-parameters instead of the layer's own.

        Args:
            phi: as `self.phi`, (tasks or 1, n_i) each.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.
        """
        rows = list(phi)
        for i, packing in enumerate((self.problems.R, self.problems.L)):
            if not packing.numel:
                # No problem has this factor: its packed row has no columns.
                rows.insert(i, G.new_empty((1, 0)))
        R, L, *bias = rows
        H = G
        if self.psd:
            # R^T R G L^T L = R^T (R G L^T) L: a transform and its adjoint with tied factors, no product of factors.
            H = adjoint(R, G, L, self.problems, backend=self.backend)
        return transform(R, H, L, self.problems, bias=bias[0] if bias else None, backend=self.backend)

    def factors(self) -> list[Pair]:
        """The factors of each parameter, as views: in-place changes under no_grad change the layer.

        Returns:
            One (R (p, p), L (q, q)) pair per parameter, None for a factor that it does not have.
        """
        Rs, Ls = views(self.R, self.problems.R), views(self.L, self.problems.L)
        return list(zip(Rs, Ls))


def _row(numel: int, like: Tensor) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros((1, numel), dtype=like.dtype, device=like.device)) if numel else None


def views(row: Tensor | None, packing: Packing) -> list[Tensor | None]:
    """The tensors of a module's own packed row, (1, n); None if there is no row or a tensor has no elements."""
    found: list[Tensor | None] = []
    offset = 0
    for shape, size in zip(packing.shapes, packing.sizes):
        # One view at a time: torch forbids in-place changes of the views that split returns.
        found.append(None if row is None or not size else row[0].narrow(0, offset, size).view(shape))
        offset += size
    return found
