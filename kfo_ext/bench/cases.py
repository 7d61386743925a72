"""Operands of the three orders of a learned update U(phi, G), and the forms in which providers take them.

    forward            Y = U(phi, G)
    backward           (dphi, dG) from (phi, G, dY)
    double_backward    (dphi, dG, ddY) from (phi, G, dY, ddphi, ddG)

phi is R and L of each Kronecker layer in turn. The plain transform is the update without psd and without hidden layers.
Every task has factors of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.packing import Packing
from kfo_ext.problems import Problems
from kfo_ext.testing import OUTPUTS, Operands, random_operands

ORDERS = tuple(OUTPUTS)
# One operand: a tensor per parameter, or one packed tensor.
Form = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Packed operands of all orders.

    Attributes:
        problems: shapes of the parameters and their factors.
        psd: whether the update has psd.
        phi: R, L of each Kronecker layer, (tasks, n) each.
        G: (tasks, n), the gradients.
        dY: (tasks, n), the cotangent of the forward.
        ddphi: as phi, the cotangents of dphi.
        ddG: (tasks, n), the cotangent of dG.
    """

    problems: Problems
    psd: bool
    phi: tuple[Tensor, ...]
    G: Tensor
    dY: Tensor
    ddphi: tuple[Tensor, ...]
    ddG: Tensor

    @property
    def hidden(self) -> int:
        """Kronecker layers before the last one."""
        return len(self.phi) // 2 - 1

    @property
    def plain(self) -> bool:
        """Whether the update is the transform itself."""
        return not self.psd and not self.hidden

    @property
    def operands(self) -> Operands:
        """The operands of the three ops, for a plain case."""
        (R, L), (ddR, ddL) = self.phi, self.ddphi
        return Operands(R, self.G, L, self.dY, ddR, self.ddG, ddL, self.G[:, : self.problems.bias.numel])

    def double(self) -> Case:
        """The same numbers in float64."""
        return replace(
            self,
            phi=tuple(X.double() for X in self.phi),
            G=self.G.double(),
            dY=self.dY.double(),
            ddphi=tuple(X.double() for X in self.ddphi),
            ddG=self.ddG.double(),
        )


class Leaves(NamedTuple):
    """The operands of a case in one form."""

    phi: list[Form]
    G: Form
    dY: Form
    ddphi: list[Form]
    ddG: Form


def random_case(
    problems: Problems,
    tasks: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    psd: bool = False,
    hidden: int = 0,
) -> Case:
    """Random operands; factors have columns of length about 1, so that hidden layers do not saturate."""

    def scaled(X: Tensor, packing: Packing) -> Tensor:
        scale = torch.cat([torch.full((shape.numel(),), shape[0] ** -0.5, dtype=dtype) for shape in packing.shapes])
        return X * scale.to(device)

    layers = [
        random_operands(problems.shapes, tasks, dtype=dtype, device=device, seed=seed + i) for i in range(hidden + 1)
    ]
    first = layers[0]
    return Case(
        problems=problems,
        psd=psd,
        phi=tuple(scaled(X, like) for o in layers for X, like in ((o.R, problems.R), (o.L, problems.L))),
        G=first.G,
        dY=first.dY,
        ddphi=tuple(scaled(X, like) for o in layers for X, like in ((o.ddR, problems.R), (o.ddL, problems.L))),
        ddG=first.ddG,
    )


def packed_leaves(case: Case) -> Leaves:
    """Every operand as one packed tensor."""
    return Leaves([[X] for X in case.phi], [case.G], [case.dY], [[X] for X in case.ddphi], [case.ddG])


def parameter_leaves(case: Case) -> Leaves:
    """Every operand as a contiguous tensor per parameter: (tasks, p, p), (tasks, q, q) and (tasks, *parameter)."""

    def unpacked(X: Tensor, packing: Packing) -> Form:
        return [piece.contiguous() for piece in packing.unpack(X)]

    def factors(phi: tuple[Tensor, ...]) -> list[Form]:
        return [unpacked(X, case.problems.L if i % 2 else case.problems.R) for i, X in enumerate(phi)]

    G, dY, ddG = (unpacked(X, case.problems.packing) for X in (case.G, case.dY, case.ddG))
    return Leaves(factors(case.phi), G, dY, factors(case.ddphi), ddG)


def task_leaves(leaves: Leaves, task: int) -> Leaves:
    """The operands of one task, from those of `parameter_leaves`: (p, p), (q, q) and (*parameter)."""

    def row(form: Form) -> Form:
        return [X[task].clone() for X in form]

    phi, G, dY, ddphi, ddG = leaves
    return Leaves([row(F) for F in phi], row(G), row(dY), [row(F) for F in ddphi], row(ddG))


def output_count(order: str, case: Case) -> int:
    """The number of packed outputs of an order."""
    return {"forward": 1, "backward": len(case.phi) + 1, "double_backward": len(case.phi) + 2}[order]
