"""A row of the table of formulas: the printed formula, the right one, and the verdict computed from both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import sympy as sp

from .losses import ALPHA, A, B, C
from .moments import TARGET, THETA, evaluated
from .quantities import QUANTITIES
from .verdicts import Relation, compare, judge

# The paper's unspecified constant; it counts as 0, since a verdict compares up to a constant.
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

    Attributes:
        number: the equation, or the section of a formula in the text.
        about: the quantity in words.
        of: its name in `QUANTITIES`, where it is derived.
        printed: the paper's formula.
        right: the right formula in a form like the printed one; None: as derived.
        constants: symbols that an additive constant may depend on.
        exact: whether no constant is allowed.
        note: the consequence, in one sentence.
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
    """A printed statement that is not a formula.

    Attributes:
        number: the equation, section or line.
        says: the statement.
        check: whether it is true, by exact computation.
        how: the method of the check.
        right: the true statement, or an addition; a function if it contains computed numbers.
        ours: whether the statement is ours, not the paper's.
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
    """Return the right formula in the form of the row, or as derived.

    Args:
        row: the row.

    Returns:
        The formula.

    Raises:
        AssertionError: the row's form does not equal the derived formula.
    """
    if row.right is None:
        return derived(row.of)
    form = resolved(row.right)
    assert compare(form, derived(row.of), exact=True).factor == 1, f"{row.number}: {form} is not {row.of}"
    return form


def relation(row: Row) -> Relation:
    """The computed verdict on a row."""
    if isinstance(row, Claim):
        return judge(row.check())
    return compare(resolved(row.printed), right_of(row), row.constants, exact=row.exact)
