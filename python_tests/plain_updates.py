"""The equations of the updates in plain torch, parameter by parameter; KFO's is in `plain_maml.py`."""

from __future__ import annotations

import torch
from plain_maml import Rule
from torch import Tensor


def plain_descent(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return gradients


def plain_meta_sgd(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    pieces = phi[0][0].split([g.numel() for g in gradients])
    return [a.view(g.shape) * g for a, g in zip(pieces, gradients)]


def with_rates(rule: Rule, step: int, steps: int) -> Rule:
    """r[step, i] times the rule's update of parameter i; the rates are the last of phi."""

    def rated(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        rates = phi[-1].view(steps, len(gradients))[step]
        return [rates[i] * U for i, U in enumerate(rule(phi[:-1], gradients))]

    return rated


def plain_meta_curvature(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Each axis multiplied by itself, with a tensor product."""
    rows = [row[0] for row in phi]
    vectors = [g for g in gradients if g.dim() == 1]
    matrices = [g for g in gradients if g.dim() > 1]
    convolutions = [g for g in gradients if g.dim() > 2]

    def squares(sizes: list[int]):
        return iter([X.view(n, n) for X, n in zip(rows.pop(0).split([n * n for n in sizes]), sizes)])

    m = iter(rows.pop(0).split([len(g) for g in vectors])) if vectors else iter(())
    if matrices:
        R = squares([g.shape[0] if g.dim() == 2 else g.shape[1] for g in matrices])
        L = squares([g.shape[1] if g.dim() == 2 else g[0, 0].numel() for g in matrices])
    outputs = squares([g.shape[0] for g in convolutions]) if convolutions else None
    updates = []
    for g in gradients:
        if g.dim() == 1:
            updates.append(next(m) * g)
        elif g.dim() == 2:
            updates.append(next(R).T @ g @ next(L))
        else:
            U = torch.tensordot(next(outputs), g.flatten(2), ([0], [0]))
            U = torch.tensordot(U, next(R), ([1], [0])).transpose(1, 2)
            updates.append(torch.tensordot(U, next(L), ([2], [0])).reshape(g.shape))
    return updates


def plain_low_rank(start: Tensor, rank: int, whole_layer: bool) -> Rule:
    """The map of each parameter as one explicit matrix of its elements, from I + A A^T - A0 A0^T of each side."""

    def rule(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        A, A0 = phi[0][0], start[0]
        at = 0

        def square(n: int) -> Tensor:
            nonlocal at
            one = torch.eye(n, dtype=A.dtype)
            if n == 1:
                return one
            now, then = (X[at : at + n * rank].view(n, rank) for X in (A, A0))
            at += n * rank
            return one + now @ now.T - then @ then.T

        updates = []
        for g in gradients:
            if whole_layer:
                S = square(g.numel())
            else:
                B, p, q = (1, len(g), g[0].numel()) if g.dim() < 3 else (*g.shape[:2], g[0, 0].numel())
                S = torch.kron(torch.eye(B, dtype=A.dtype), torch.kron(square(p), square(q)))
            updates.append((S @ g.reshape(-1)).view(g.shape))
        return updates

    return rule


def plain_chain(*parts: tuple[Rule, int]) -> Rule:
    """Rules one after the other, each with that many of phi."""

    def rule(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        start = 0
        for part, count in parts:
            gradients = part(phi[start : start + count], gradients)
            start += count
        return gradients

    return rule


def plain_choice(choice: list[int], *parts: tuple[Rule, int]) -> Rule:
    """For each parameter the rule that it has, each with that many of phi."""

    def rule(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        updates: dict[int, Tensor] = {}
        start = 0
        for number, (part, count) in enumerate(parts):
            own = [i for i, chosen in enumerate(choice) if chosen == number]
            updates.update(zip(own, part(phi[start : start + count], [gradients[i] for i in own])))
            start += count
        return [updates[i] for i in range(len(gradients))]

    return rule
