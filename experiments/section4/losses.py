"""The MAML losses of SHALLOW and DEEP, derived from their definition: one inner step, then expectations.

The inner step is gradient descent on the population loss of a task. The loss has the factor 1/2 of equation 30.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import sympy as sp

from .moments import NOISE, TARGET, THETA, X, expectation

# A learning rate is positive: sqrt(alpha^2) is alpha.
ALPHA, BETA = sp.symbols("alpha beta", positive=True)
A, B, C = sp.symbols("a b c", real=True)


class Model(NamedTuple):
    """A model y = slope x, and the parameters that the inner step adapts."""

    slope: sp.Expr
    adapted: tuple[sp.Symbol, ...]


SHALLOW = Model(C, (C,))
DEEP = Model(A * B, (A, B))
# DEEP with a held fixed in the inner step, as in equations 16 to 18 and 20.
DEEP_HEAD = Model(A * B, (B,))


def regression_loss(slope: sp.Expr) -> sp.Expr:
    """1/2 E (y - slope x)^2 of the task theta (equation 30)."""
    return expectation((TARGET - slope * X) ** 2, X, NOISE) / 2


def task_loss(model: Model) -> sp.Expr:
    """The loss of one task before adaptation."""
    return regression_loss(model.slope)


def gradient(model: Model) -> dict[sp.Symbol, sp.Expr]:
    """The gradient of the task's loss in each adapted parameter."""
    return {p: sp.expand(sp.diff(task_loss(model), p)) for p in model.adapted}


def adapted(model: Model) -> dict[sp.Symbol, sp.Expr]:
    """The adapted parameters after one inner step."""
    return {p: p - ALPHA * slope for p, slope in gradient(model).items()}


def adapted_slope(model: Model) -> sp.Expr:
    """The model's slope after one inner step: k of SHALLOW, f of DEEP."""
    return sp.expand(model.slope.subs(adapted(model), simultaneous=True))


def adapted_loss(model: Model) -> sp.Expr:
    """The loss of one task after one inner step."""
    return regression_loss(adapted_slope(model))


def maml_loss(model: Model) -> sp.Expr:
    """The MAML loss: the mean of `adapted_loss` over tasks (equation 1)."""
    return expectation(adapted_loss(model), THETA)


NOISE_FLOOR = sp.Rational(1, 2)


def numeric(expression: sp.Expr, *symbols: sp.Symbol) -> Callable[..., float]:
    """The expression as a function of numbers or arrays, in the order of the symbols."""
    return sp.lambdify(symbols, expression, "numpy")


def value(expression: sp.Expr, at: Mapping[sp.Symbol, float]) -> float:
    """The value of the expression at a point."""
    return float(expression.subs(at))
