"""One Kronecker layer: packed factors for a whole group of parameters, and the map they make of packed gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfo_ext.functional import adjoint, transform
from kfo_ext.problems import Problems
from kfo_ext.updates.base import Phi


class KroneckerLayer(nn.Module):
    """K(g) = R^T g L (+ bias), or with psd R^T R g L^T L (+ bias), for every parameter of a group.

    Args:
        problems: the group.
        psd: take R^T R and L^T L in place of R and L, so that the map is symmetric positive semi-definite.
        bias: learn a (p, q) term per parameter, broadcast over B; it starts at 0.
        zero: start R at 0 in place of the identity: the zero map, which still learns because L is the identity.
        like: a tensor that gives dtype and device.
        backend: see `kfo_ext.transform`.

    Source: paper, appendix C.1; learn2learn's KroneckerTransform is psd by default.
    """

    def __init__(self, problems: Problems, *, psd: bool, bias: bool, zero: bool, like: Tensor, backend: str) -> None:
        super().__init__()
        self.problems = problems
        self.psd = psd
        self.backend = backend
        options = {"dtype": like.dtype, "device": like.device}
        self.R = nn.Parameter(torch.zeros((1, problems.R.numel), **options))
        self.L = nn.Parameter(torch.zeros((1, problems.L.numel), **options))
        self.bias = nn.Parameter(torch.zeros((1, problems.bias.numel), **options)) if bias else None
        with torch.no_grad():
            for R, L in self.factors():
                R.fill_diagonal_(0 if zero else 1)
                L.fill_diagonal_(1)

    @property
    def phi(self) -> Phi:
        """The layer's packed meta-parameters, one row each: R, L and, where the layer has one, the bias."""
        return (self.R, self.L) if self.bias is None else (self.R, self.L, self.bias)

    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """K(g) with the given meta-parameters, (tasks or 1, n) each, in place of the layer's own; G: (tasks, n)."""
        R, L, *bias = phi
        H = G
        if self.psd:
            # R^T R G L^T L = R^T (R G L^T) L: a transform and its adjoint with tied factors, no product of factors.
            H = adjoint(R, G, L, self.problems, backend=self.backend)
        return transform(R, H, L, self.problems, bias=bias[0] if bias else None, backend=self.backend)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """One (R (p, p), L (q, q)) pair of views per parameter; in-place changes under no_grad show in the layer."""
        pairs = []
        offset_R = offset_L = 0
        for _, p, q in self.problems.shapes:
            # Views one by one: torch forbids in-place changes of what split returns.
            pairs.append(
                (self.R[0].narrow(0, offset_R, p * p).view(p, p), self.L[0].narrow(0, offset_L, q * q).view(q, q))
            )
            offset_R += p * p
            offset_L += q * q
        return pairs
