"""The statements of section 4 and appendix A that are not formulas, each with an exact check."""

from __future__ import annotations

import sympy as sp

from .losses import (
    ALPHA,
    BETA,
    DEEP,
    DEEP_HEAD,
    NOISE_FLOOR,
    SHALLOW,
    A,
    B,
    C,
    adapted_loss,
    adapted_slope,
    maml_loss,
)
from .moments import THETA, expectation
from .rows import P1, P2, P3, Claim, derived
from .stationary import Stationary, at, critical_rate, deep_gradient, deep_hessian, paper_points, stationary_points
from .verdicts import HOLDS, WRONG, compare

# Inner rates at which the stationary points are counted.
RATES = tuple(map(sp.Rational, ("1/10", "1/2", "9/10")))
KINDS = (("minimum", "minima"), ("saddle", "saddles"), ("maximum", "maxima"))
# The factor of the error signal in equation 17.
STEP_SIZE = A * (1 - ALPHA * A**2) ** 2


def minimizer_is_zero() -> bool:
    """Whether c = 0 is the only minimizer of SHALLOW's loss, and the loss is convex."""
    loss = maml_loss(SHALLOW)
    curvature = sp.factor(sp.diff(loss, C, 2))
    return sp.solve(sp.diff(loss, C), C) == [0] and compare(curvature, (1 - ALPHA) ** 2, exact=True).verdict == HOLDS


def eleven_follows_from_ten() -> bool:
    """Whether the mean of equation 10 is equation 11, up to an additive constant."""
    mean = expectation((1 - ALPHA) ** 2 * (C - THETA) ** 2, THETA)
    return compare(2 * (1 - ALPHA) ** 2 * C**2, mean, (ALPHA,)).factor == 1


def one_step_is_exact_only_at_one() -> bool:
    """Whether one step from c = 0 reaches every theta only for alpha = 1."""
    return sp.solve(derived("SHALLOW: step from 0") - THETA, ALPHA) == [1]


def no_gradient_at_one() -> bool:
    """Whether SHALLOW's gradient vanishes at alpha = 1, for every c and task."""
    return sp.expand(sp.diff(adapted_loss(SHALLOW), C).subs(ALPHA, 1)) == 0


def shallow_is_at_the_floor_at_one() -> bool:
    """Whether SHALLOW's loss is the noise floor for every c at alpha = 1."""
    return sp.expand(maml_loss(SHALLOW).subs(ALPHA, 1)) == NOISE_FLOOR


def origin_is_a_maximum() -> bool:
    """Whether the gradient vanishes at the origin, and the Hessian is negative definite."""
    origin = paper_points()[0]
    return at(deep_gradient(), *origin) == sp.zeros(2, 1) and bool(at(deep_hessian(), *origin).is_negative_definite)


def solutions_are_minima() -> bool:
    """Whether the gradient vanishes at the four solutions, and the Hessian is positive definite."""
    return all(
        at(deep_gradient(), *point) == sp.zeros(2, 1) and at(deep_hessian(), *point).is_positive_definite
        for point in paper_points()[1:]
    )


def solutions_are_all_global_minima() -> bool:
    """Whether the loss is the noise floor at the four solutions, above it elsewhere."""
    f = adapted_slope(DEEP)
    excess = expectation((f - THETA) ** 2, THETA) / 2
    if compare(maml_loss(DEEP) - NOISE_FLOOR, excess, exact=True).verdict != HOLDS:
        return False
    # Without excess, f - theta vanishes in every power of theta.
    places = sp.solve(sp.Poly(f - THETA, THETA).coeffs(), (A, B), dict=True)
    return {(place[A], place[B]) for place in places} == set(paper_points()[1:])


def step_grows_near_the_solution() -> bool:
    """Whether the step size has a strict minimum, 0, at a = 1 / sqrt(alpha)."""
    root = paper_points()[1][0]
    values = [sp.simplify(sp.diff(STEP_SIZE, A, order).subs(A, root)) for order in range(3)]
    return values[:2] == [0, 0] and bool(values[2].is_positive)


def step_shrinks_further_away() -> bool:
    """Whether the step size has one extremum between the origin, where it is 0, and the solution."""
    return len(_turns()) == 1 and STEP_SIZE.subs(A, 0) == 0


def _turns() -> list[sp.Expr]:
    """The extrema of the step size between 0 and the solution."""
    root = paper_points()[1][0]
    zeros = sp.solve(sp.diff(STEP_SIZE, A), A)
    return [zero for zero in zeros if zero.is_positive and sp.simplify(zero / root) < 1]


def adaptation_needs_no_rate() -> bool:
    """Whether the slope after one step from the solution is free of alpha."""
    return ALPHA not in derived("DEEP: slope after a step from the solution").free_symbols


def fixed_head_is_another_gradient() -> bool:
    """Whether equation 17 differs from the step of b for the loss of equation 40."""
    held, whole = (B - BETA * sp.diff(adapted_loss(model), B) for model in (DEEP_HEAD, DEEP))
    return compare(held, whole, (B,)).verdict == WRONG


def maml_gradient_holds() -> bool:
    """Whether equation 28 holds for every cubic loss of two parameters."""
    p, q = sp.symbols("p q", real=True)
    powers = [(i, j) for i in range(4) for j in range(4 - i) if i + j]
    loss = sp.Add(*(sp.Symbol(f"l{i}{j}", real=True) * p**i * q**j for i, j in powers))
    slope = sp.Matrix([sp.diff(loss, each) for each in (p, q)])
    after = {p: p - ALPHA * slope[0], q: q - ALPHA * slope[1]}
    maml = loss.subs(after, simultaneous=True)
    left = sp.Matrix([sp.diff(maml, each) for each in (p, q)])
    right = (sp.eye(2) - ALPHA * sp.hessian(loss, (p, q))) * slope.subs(after, simultaneous=True)
    return (left - right).applyfunc(sp.expand) == sp.zeros(2, 1)


def fifty_three_follows_from_forty_three() -> bool:
    """Whether equation 43 with 50 and 52 is equation 53."""
    square = P1**2 + P2**2 + 3 * P3**2 + 2 * P1 * P3
    return compare((1 + square - P2) / 2, (1 + square - 2 * P2) / 2, exact=True).verdict == HOLDS


def five_points_are_stationary() -> bool:
    """Whether the gradient vanishes at the five points, for every alpha."""
    return all(at(deep_gradient(), *point) == sp.zeros(2, 1) for point in paper_points())


def there_are_more_points() -> bool:
    """Whether there are further stationary points, on abs(a) = abs(b), at three inner rates."""
    return all(len(points := stationary_points(rate)) > len(paper_points()) and _diagonal(points) for rate in RATES)


def _diagonal(points: tuple[Stationary, ...]) -> bool:
    """Whether all but the paper's points have abs(a) = abs(b), and none of them is a minimum."""
    further = [point for point in points if point.a * point.b != 0]
    return len(further) == len(points) - len(paper_points()) and all(
        abs(point.a) == abs(point.b) and point.kind != "minimum" for point in further
    )


def _count(kinds: list[str], one: str, several: str) -> str:
    count = kinds.count(one)
    return f"{count} {one if count == 1 else several}"


def counted() -> str:
    """The number of stationary points of each kind at each rate."""
    counts = []
    for rate in RATES:
        kinds = [point.kind for point in stationary_points(rate)]
        parts = ", ".join(_count(kinds, *names) for names in KINDS)
        counts.append(f"{len(kinds)} at $\\alpha = {float(rate)}$ ({parts})")
    return (
        f"There are {'; '.join(counts)}. The further ones have $a = b$ or $a = -b$; "
        f"their number changes at $\\alpha = {float(critical_rate()):.4f}$."
    )


def step_size_turns() -> str:
    """The sentence on the extremum of the step size."""
    (turn,) = _turns()
    return f"Inwards it grows down to $a = {sp.latex(turn)}$ only, and is 0 at $a = 0$."


MAIN = (
    Claim(
        "10 to 11",
        "Equation 11 is the mean of equation 10 over tasks.",
        eleven_follows_from_ten,
        "exact mean of equation 10",
        r"The mean is half of what is printed: $(1 - \alpha)^2 c^2 + \text{CONST}$.",
    ),
    Claim(
        "4.3",
        "SHALLOW's MAML loss is convex, and its minimizer is c = 0.",
        minimizer_is_zero,
        "second derivative; the gradient's only zero",
        r"For $\alpha \neq 1$; at $\alpha = 1$ the loss is constant.",
    ),
    Claim(
        "4.3",
        "One step from c = 0 is optimal for alpha = 1 alone.",
        one_step_is_exact_only_at_one,
        r"solutions $\alpha$ of equation 15 = $\theta$",
    ),
    Claim(
        "4.3",
        "At alpha = 1 the gradient of SHALLOW's MAML loss is zero.",
        no_gradient_at_one,
        "gradient after one step, for every c and task",
    ),
    Claim(
        "4.3",
        "SHALLOW's MAML loss is then the noise floor 1/2 for every c.",
        shallow_is_at_the_floor_at_one,
        "MAML loss at that rate",
        '"Meta-learning cannot occur", since nothing is left to learn: SHALLOW fails at other rates alone.',
        ours=True,
    ),
    Claim("4.4", "The origin is a local maximum.", origin_is_a_maximum, "gradient; Hessian negative definite"),
    Claim(
        "4.4",
        "The four solutions are local minima.",
        solutions_are_minima,
        "gradient; Hessian positive definite, for every alpha",
    ),
    Claim(
        "4.4, Fig. 2",
        "They are the MAML solutions, and there are four.",
        solutions_are_all_global_minima,
        r"loss minus 1/2 is $\mathbb{E}(f - \theta)^2 / 2$; all zeros of that",
        "They are the global minima, at the noise floor 1/2, for every alpha.",
    ),
    Claim(
        "4.4",
        "Adaptation from the solution does not depend on alpha.",
        adaptation_needs_no_rate,
        "slope after one step of a and b",
    ),
    Claim(
        "17",
        "If the inner step adapts a too, as in equation 40, the meta-step of b is another one.",
        fixed_head_is_another_gradient,
        "gradient in b of the loss after one step of a and b",
        "The paper holds a fixed in equations 16 to 18 and 20, as ANIL would.",
        ours=True,
    ),
    Claim(
        "4.5",
        "Near the solution, the farther a is from it, the bigger the step.",
        step_grows_near_the_solution,
        r"$a(1 - \alpha a^2)^2$ and two derivatives at $a = 1/\sqrt{\alpha}$",
    ),
    Claim(
        "4.5",
        "Further away, towards the origin, the step shrinks again.",
        step_shrinks_further_away,
        "zeros of the derivative",
        step_size_turns,
        ours=True,
    ),
)

APPENDIX = (
    Claim(
        "28",
        "The MAML gradient is $(I - \\alpha H)$ times the gradient at the adapted parameters.",
        maml_gradient_holds,
        "every cubic loss of two parameters",
    ),
    Claim(
        "43 to 53",
        "Equation 53 is equation 43 with 50 and 52.",
        fifty_three_follows_from_forty_three,
        "substitution",
        "The cross term of 43 has half the size it has in 53.",
    ),
    Claim(
        "A, below 54",
        "There are at least five stationary points.",
        five_points_are_stationary,
        "gradient at the five, for every alpha",
    ),
    Claim(
        "A, below 54",
        "There are more, and none of them is a minimum.",
        there_are_more_points,
        "all real roots, isolated exactly, at three inner rates",
        counted,
        ours=True,
    ),
)
