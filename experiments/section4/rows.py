"""A row of the table of formulas: what is printed, what is right, and the verdict computed from the two."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import sympy as sp

from .losses import ALPHA, A, B, C
from .moments import TARGET, THETA, evaluated
from .quantities import QUANTITIES
from .verdicts import Relation, compare, judge

# What the paper leaves open; it counts as 0, since a verdict compares up to a constant.
CONST = sp.Symbol("CONST", real=True)
# Names that the paper gives to longer expressions, y = theta x + n and those of equations 32, 41 and 49.
Y, F, K, P1, P2, P3 = sp.symbols("y f k p1 p2 p3", real=True)
MEANING = {
    Y: TARGET,
    K: (1 - ALPHA) * C + ALPHA * THETA,
    F: (A - ALPHA * B * (A * B - THETA)) * (B - ALPHA * A * (A * B - THETA)),
    P1: A * B - ALPHA * (A**2 + B**2) * A * B + ALPHA**2 * A**3 * B**3,
    P2: ALPHA * (A**2 + B**2) - 2 * ALPHA**2 * A**2 * B**2,
    P3: ALPHA**2 * A * B,
    CONST: sp.Integer(0),
}


class Formula(NamedTuple):
    """A printed formula.

    number: the equation, or the section of a formula in the text.
    about: what it is a formula of.
    of: the name of that in `QUANTITIES`, where it is derived.
    printed: as the paper has it.
    right: the same quantity in a form like the printed one; None: as printed.
    constants: symbols that an additive constant may depend on.
    exact: whether no constant is allowed.
    note: what follows, in one sentence.
    """

    number: str
    about: str
    of: str
    printed: Any
    right: Any = None
    constants: tuple[sp.Symbol, ...] = ()
    exact: bool = False
    note: str = ""


class Claim(NamedTuple):
    """A printed statement that is no formula.

    number: the equation, section or line.
    says: the statement.
    check: whether it is true, by exact computation.
    how: what the check computes.
    right: what is true instead, or beside it; a function where that has computed numbers.
    ours: whether the paper does not say it.
    """

    number: str
    says: str
    check: Callable[[], bool]
    how: str
    right: str | Callable[[], str] = ""
    ours: bool = False


Row = Formula | Claim


def resolved(expression: Any) -> Any:
    """A printed expression with the paper's names replaced and its expectations computed."""
    return evaluated(sp.sympify(expression).subs(MEANING, simultaneous=True))


@cache
def derived(name: str) -> Any:
    """The right formula of a quantity."""
    return QUANTITIES[name]()


def right_of(row: Formula) -> Any:
    """The right formula in the form of the row, or as it was derived.

    Raises:
        AssertionError: the row's form is not what was derived.
    """
    if row.right is None:
        return derived(row.of)
    form = resolved(row.right)
    assert compare(form, derived(row.of), exact=True).factor == 1, f"{row.number}: {form} is not {row.of}"
    return form


def relation(row: Row) -> Relation:
    """The verdict on a row, computed."""
    if isinstance(row, Claim):
        return judge(row.check())
    return compare(resolved(row.printed), right_of(row), row.constants, exact=row.exact)
