"""The quantities of section 4 and appendix A, each derived here from its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp

from .losses import (
    ALPHA,
    BETA,
    DEEP,
    DEEP_HEAD,
    SHALLOW,
    A,
    B,
    C,
    adapted,
    adapted_loss,
    adapted_slope,
    gradient,
    maml_loss,
    task_loss,
)
from .moments import THETA, expectation
from .stationary import at, deep_gradient, deep_hessian, paper_points

# Second moments of a task's support and query examples: of x, and of x with y.
SXX, SXY, QXX, QXY = sp.symbols("S_xx S_xy Q_xx Q_xy", real=True)
# The parameter of a linear meta-optimizer, U(g) = xi g.
XI = sp.Symbol("xi", real=True)
ORIGIN, ON_A, _, ON_B, _ = paper_points()


def _product() -> sp.Expr:
    """f, in powers of theta."""
    return sp.expand(adapted_slope(DEEP))


def _power_of_theta(power: int) -> sp.Expr:
    return _product().coeff(THETA, power)


def _after_both() -> sp.Expr:
    """The slope after one step of a and b from a = 1 / sqrt(alpha) and any b."""
    return sp.expand(_product().subs(A, ON_A[0]))


def _head_step() -> sp.Expr:
    return sp.diff(adapted_loss(DEEP_HEAD), B)


def _sampled_gradient() -> sp.Expr:
    """Derive the gradient in b of a query loss after one step of b on support examples.

    Half a mean squared error is (S_xx k^2 - 2 S_xy k) / 2 in the slope k, up to a constant in the parameters.

    Returns:
        The gradient at the solution on the a-axis.
    """
    step = ALPHA * A * (SXX * A * B - SXY)
    k = A * (B - step)
    return sp.simplify(sp.diff((QXX * k**2 - 2 * QXY * k) / 2, B).subs({A: ON_A[0], B: 0}, simultaneous=True))


def _optimizer_loss() -> sp.Expr:
    """SHALLOW's loss after one step by U(g) = xi g with the factor alpha (equation 22)."""
    step = ALPHA * XI * gradient(SHALLOW)[C]
    return task_loss(SHALLOW).subs(C, C - step)


# The right formula by name. python_tests/test_section4.py checks every entry.
QUANTITIES: dict[str, Callable[[], Any]] = {
    "SHALLOW: loss of a task": lambda: task_loss(SHALLOW),
    "SHALLOW: gradient": lambda: gradient(SHALLOW)[C],
    "SHALLOW: step": lambda: adapted(SHALLOW)[C],
    "SHALLOW: step from 0": lambda: adapted(SHALLOW)[C].subs(C, 0),
    "SHALLOW: loss after a step": lambda: adapted_loss(SHALLOW),
    "SHALLOW: gradient after a step": lambda: sp.diff(adapted_loss(SHALLOW), C),
    "SHALLOW: meta-step": lambda: C - BETA * sp.diff(adapted_loss(SHALLOW), C),
    "SHALLOW: meta-step from 0": lambda: (C - BETA * sp.diff(adapted_loss(SHALLOW), C)).subs(C, 0),
    "SHALLOW: MAML loss": lambda: maml_loss(SHALLOW),
    "DEEP: loss of a task": lambda: task_loss(DEEP),
    "DEEP: gradient in a": lambda: gradient(DEEP)[A],
    "DEEP: gradient in b": lambda: gradient(DEEP)[B],
    "DEEP: step of a": lambda: adapted(DEEP)[A],
    "DEEP: step of b": lambda: adapted(DEEP)[B],
    "DEEP, a held: gradient after a step": _head_step,
    "DEEP, a held: meta-step": lambda: B - BETA * _head_step(),
    "DEEP, a held: meta-step at the solution": lambda: (B - BETA * _head_step()).subs(
        {A: ON_A[0], B: 0}, simultaneous=True
    ),
    "DEEP, a held: gradient of sampled tasks at the solution": _sampled_gradient,
    "DEEP, a held: step from any b": lambda: sp.expand(adapted(DEEP_HEAD)[B].subs(A, ON_A[0])),
    "DEEP: slope after a step from any b": _after_both,
    "DEEP: slope after a step from the solution": lambda: _after_both().subs(B, 0),
    "DEEP: gradient after a step at the solution": lambda: at(
        sp.Matrix([sp.diff(adapted_loss(DEEP), q) for q in (A, B)]), *ON_A
    ),
    "DEEP: slope after a step": _product,
    "DEEP: squared slope": lambda: sp.expand(_product() ** 2),
    "DEEP: p1": lambda: _power_of_theta(0),
    "DEEP: p2": lambda: _power_of_theta(1),
    "DEEP: p3": lambda: _power_of_theta(2),
    "DEEP: mean squared slope": lambda: expectation(_product() ** 2, THETA),
    "DEEP: mean of theta times slope": lambda: expectation(_product() * THETA, THETA),
    "DEEP: MAML loss": lambda: maml_loss(DEEP),
    "DEEP: MAML gradient on the a-axis": lambda: sp.simplify(deep_gradient().subs(B, 0)),
    "DEEP: Hessian at the origin": lambda: at(deep_hessian(), *ORIGIN),
    "DEEP: Hessian on the a-axis": lambda: at(deep_hessian(), *ON_A),
    "DEEP: Hessian on the b-axis": lambda: at(deep_hessian(), *ON_B),
    "moments of theta": lambda: sp.Matrix([expectation(THETA**k, THETA) for k in (2, 3, 4)]),
    "meta-optimizer: step": lambda: C - ALPHA * XI * gradient(SHALLOW)[C],
    "meta-optimizer: gradient after a step": lambda: sp.Matrix([sp.diff(_optimizer_loss(), q) for q in (C, XI)]),
}
