"""The stationary points of DEEP's MAML loss, exactly: the five of the paper, and all others.

The loss depends on a and b only through s = a^2 + b^2 and p = a b. Its gradient is
2 a L_s + b L_p, 2 b L_s + a L_p, whose determinant is 4 (a^2 - b^2): a stationary point has L_s = L_p = 0, or abs(a) =
abs(b). Either case leaves one polynomial in one unknown, whose real roots are isolated exactly.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import sympy as sp

from .losses import ALPHA, DEEP, A, B, maml_loss

# The digits of a stationary point without a closed formula.
DIGITS = 30
P, S, U = sp.symbols("p s u", real=True)


class Stationary(NamedTuple):
    """A stationary point: its place, kind and loss."""

    a: float
    b: float
    kind: str
    loss: float


@cache
def deep_gradient() -> sp.Matrix:
    """The gradient of DEEP's MAML loss in (a, b)."""
    return sp.Matrix([sp.expand(sp.diff(maml_loss(DEEP), q)) for q in (A, B)])


@cache
def deep_hessian() -> sp.Matrix:
    """The Hessian of DEEP's MAML loss in (a, b)."""
    return sp.hessian(maml_loss(DEEP), (A, B))


def at(expression: sp.Matrix, a: sp.Expr, b: sp.Expr) -> sp.Matrix:
    """A gradient or Hessian at a point."""
    return expression.subs({A: a, B: b}, simultaneous=True).applyfunc(sp.simplify)


def paper_points() -> list[tuple[sp.Expr, sp.Expr]]:
    """The origin and the four MAML solutions of section 4.4."""
    root, zero = 1 / sp.sqrt(ALPHA), sp.Integer(0)
    return [(zero, zero), (root, zero), (-root, zero), (zero, root), (zero, -root)]


@cache
def symmetric_loss() -> sp.Expr:
    """DEEP's MAML loss as a polynomial in s = a^2 + b^2 and p = a b."""
    sums, rest, names = sp.symmetrize(maml_loss(DEEP), [A, B], formal=True)
    assert rest == 0
    (total, _), (product, _) = names
    loss = sp.expand(sums.subs({product: P}).subs(total, sp.sqrt(S + 2 * P)))
    assert sp.expand(loss.subs({S: A**2 + B**2, P: A * B}, simultaneous=True) - maml_loss(DEEP)) == 0
    return loss


@cache
def stationary_points(alpha: sp.Rational) -> tuple[Stationary, ...]:
    """Find every stationary point at a rational inner rate.

    Args:
        alpha: the inner rate.

    Returns:
        The points by kind and then place.

    Raises:
        ValueError: the rate is no positive rational number.
    """
    alpha = sp.sympify(alpha)
    if not (isinstance(alpha, sp.Rational) and alpha > 0):
        raise ValueError(f"alpha: expected a positive rational number, such as sympy.Rational(1, 10), got {alpha}")
    loss = symmetric_loss().subs(ALPHA, alpha)
    pairs = _apart(loss) | _diagonal(loss)
    points = [_point(alpha, *pair) for pair in pairs]
    return tuple(sorted(points, key=lambda point: (point.kind, point.a, point.b)))


def _apart(loss: sp.Expr) -> set[tuple[sp.Expr, sp.Expr]]:
    """The points with L_s = L_p = 0; L_s is linear in s, with a positive slope."""
    (total,) = sp.solve(sp.diff(loss, S), S)
    condition = sp.numer(sp.together(sp.diff(loss, P).subs(S, total)))
    found = set()
    for p in set(sp.real_roots(sp.Poly(condition, P))):
        s = total.subs(P, p).evalf(DIGITS)
        # a + b and a - b, squared.
        plus, minus = s + 2 * p.evalf(DIGITS), s - 2 * p.evalf(DIGITS)
        if plus >= 0 and minus >= 0:
            half, gap = sp.sqrt(plus) / 2, sp.sqrt(minus) / 2
            found |= {(i * half + j * gap, i * half - j * gap) for i in (1, -1) for j in (1, -1)}
    return found


@cache
def critical_rate() -> sp.Expr:
    """The inner rate below which there are three points, not one, on each half of a = b and a = -b."""
    conditions = [_condition(symmetric_loss(), sign) for sign in (1, -1)]
    roots = {
        root
        for condition in conditions
        for factor, _ in sp.factor_list(sp.discriminant(condition, U))[1]
        for root in sp.real_roots(sp.Poly(factor, ALPHA))
        if root > 0
    }
    (rate,) = roots
    return rate


def _condition(loss: sp.Expr, sign: int) -> sp.Poly:
    """The equation of a^2 = u at a stationary point with b = sign * a other than the origin."""
    return sp.Poly(sp.diff(loss.subs({S: 2 * U, P: sign * U}, simultaneous=True), U), U)


def _diagonal(loss: sp.Expr) -> set[tuple[sp.Expr, sp.Expr]]:
    """The points with abs(a) = abs(b), including the origin; a^2 = u."""
    found = {(sp.Float(0, DIGITS), sp.Float(0, DIGITS))}
    for sign in (1, -1):
        for root in set(sp.real_roots(_condition(loss, sign))):
            if root > 0:
                a = sp.sqrt(root.evalf(DIGITS))
                found |= {(a, sign * a), (-a, -sign * a)}
    return found


def _point(alpha: sp.Rational, a: sp.Expr, b: sp.Expr) -> Stationary:
    place = {ALPHA: alpha, A: a, B: b}
    assert all(abs(slope.subs(place)) < 1e-20 for slope in deep_gradient())
    hessian = deep_hessian().subs(place)
    determinant, trace = hessian.det(), hessian.trace()
    kind = "saddle" if determinant < 0 else "minimum" if trace > 0 else "maximum"
    assert abs(determinant) > 1e-15
    return Stationary(float(a), float(b), kind, float(maml_loss(DEEP).subs(place)))
