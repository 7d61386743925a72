"""The verdict on a formula, computed from the printed and the right one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import sympy as sp

HOLDS = "holds"
CONSTANT = "holds up to a constant"
WRONG = "does not hold"


class Relation(NamedTuple):
    """A relation printed = factor * right + shift; factor is None if there is none."""

    verdict: str
    factor: sp.Expr | None = None
    shift: sp.Expr | None = None


def compare(printed: Any, right: Any, constants: Iterable[sp.Symbol] = (), *, exact: bool = False) -> Relation:
    """Find the relation of a printed formula to the right one.

    It holds if the difference simplifies to 0. It holds up to a constant if printed = factor * right + shift, where the
    factor is a positive number: minimizers and gradient directions are then the same.

    Args:
        printed: an expression without expectations, or a matrix.
        right: the right one, of the same shape.
        constants: the symbols that the shift may depend on, as a loss's constant may depend on the inner rate.
        exact: whether no factor or shift is allowed.

    Returns:
        The relation.

    Raises:
        ValueError: the shapes differ.
    """
    pairs = list(zip(*_entries(printed, right)))
    if all(_zero(p - r) for p, r in pairs):
        return Relation(HOLDS, sp.Integer(1), sp.Integer(0))
    if exact:
        return Relation(WRONG)
    place = _place(pairs, constants)
    # Without a symbol to vary, only a ratio can be compared.
    moved = [(p - p.subs(place), r - r.subs(place)) for p, r in pairs] if place else pairs
    varying = [(p, r) for p, r in moved if not _zero(r)]
    if not varying:
        return Relation(WRONG)
    factor = sp.simplify(varying[0][0] / varying[0][1])
    if not (factor.is_number and factor.is_positive and all(_zero(p - factor * r) for p, r in moved)):
        return Relation(WRONG)
    shifts = [sp.factor(sp.simplify(p - factor * r)) for p, r in pairs]
    if any(not _zero(shift - shifts[0]) for shift in shifts):
        return Relation(WRONG)
    return Relation(CONSTANT, factor, shifts[0])


def judge(truth: bool) -> Relation:
    """The verdict on a claim that is not a formula."""
    return Relation(HOLDS if truth else WRONG)


def _entries(printed: Any, right: Any) -> tuple[list[sp.Expr], list[sp.Expr]]:
    one, other = (side if isinstance(side, sp.MatrixBase) else sp.Matrix([side]) for side in (printed, right))
    if one.shape != other.shape:
        raise ValueError(f"printed, right: expected matrices of one shape, got {one.shape} and {other.shape}")
    return list(one), list(other)


def _place(pairs: Iterable[tuple[sp.Expr, sp.Expr]], constants: Iterable[sp.Symbol]) -> dict[sp.Symbol, sp.Expr]:
    """A rational point for every symbol that the shift may not depend on."""
    symbols = set().union(*(p.free_symbols | r.free_symbols for p, r in pairs)) - set(constants)
    return {symbol: sp.Rational(3 + 2 * i, 7) for i, symbol in enumerate(sorted(symbols, key=str))}


def _zero(expression: sp.Expr) -> bool:
    return sp.simplify(sp.expand(expression)) == 0
