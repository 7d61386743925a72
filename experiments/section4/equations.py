"""The formulas of sections 4.1 to 4.5, appendix A and Algorithm 1, as printed."""

from __future__ import annotations

import sympy as sp

from .losses import ALPHA, BETA, A, B, C
from .moments import THETA, MetaMean, TaskMean, X
from .quantities import QXX, QXY, SXX, SXY, XI
from .rows import CONST, P1, P2, P3, F, Formula, K, Y

HALF = sp.Rational(1, 2)
ROOT = sp.sqrt(ALPHA)
ERROR = A * B - THETA

MAIN = (
    Formula(
        "8",
        "loss of a task, SHALLOW",
        "SHALLOW: loss of a task",
        TaskMean((Y - C * X) ** 2),
        TaskMean((Y - C * X) ** 2) / 2,
        note="Equations 10 to 20 need the 1/2 of equation 30.",
    ),
    Formula(
        "8 in 14",
        "inner step by the gradient of equation 8",
        "SHALLOW: step",
        C - 2 * ALPHA * (C - THETA),
        C - ALPHA * (C - THETA),
        exact=True,
        note="Without the 1/2 every inner rate below is doubled.",
    ),
    Formula(
        "9",
        "loss of a task, DEEP",
        "DEEP: loss of a task",
        TaskMean((Y - A * B * X) ** 2),
        TaskMean((Y - A * B * X) ** 2) / 2,
        note="As equation 8.",
    ),
    Formula(
        "10, 34",
        "loss of a task after one step, SHALLOW",
        "SHALLOW: loss after a step",
        (1 - ALPHA) ** 2 * (C - THETA) ** 2 + CONST,
        (1 - ALPHA) ** 2 * (C - THETA) ** 2 / 2 + HALF,
    ),
    Formula(
        "11, 35",
        "MAML loss, SHALLOW",
        "SHALLOW: MAML loss",
        2 * (1 - ALPHA) ** 2 * C**2 + CONST,
        (1 - ALPHA) ** 2 * (C**2 + 1) / 2 + HALF,
        (ALPHA,),
        note="The constant depends on the inner rate, and is what SHALLOW cannot remove.",
    ),
    Formula(
        "12",
        "gradient after one step, SHALLOW (printed: proportional to)",
        "SHALLOW: gradient after a step",
        (1 - ALPHA) ** 2 * (C - THETA),
        note="Holds with equality.",
    ),
    Formula("13", "meta-step, SHALLOW", "SHALLOW: meta-step", C - BETA * (1 - ALPHA) ** 2 * (C - THETA)),
    Formula("14", "inner step, SHALLOW", "SHALLOW: step", C - ALPHA * (C - THETA)),
    Formula("15", "inner step from c = 0", "SHALLOW: step from 0", ALPHA * THETA),
    Formula(
        "4.4",
        "Hessian of DEEP's MAML loss at the origin",
        "DEEP: Hessian at the origin",
        -4 * ALPHA * sp.eye(2),
        -2 * ALPHA * sp.eye(2),
    ),
    Formula(
        "4.4",
        "the same at the two solutions on the a-axis",
        "DEEP: Hessian on the a-axis",
        sp.diag(8 * ALPHA, 6 * ALPHA**3),
        sp.diag(4 * ALPHA, 3 * ALPHA**3),
    ),
    Formula(
        "4.4",
        "the same at the two solutions on the b-axis",
        "DEEP: Hessian on the b-axis",
        sp.diag(8 * ALPHA, 6 * ALPHA**3),
        sp.diag(3 * ALPHA**3, 4 * ALPHA),
        note="The text gives one Hessian for all four; equation 57 has the order right.",
    ),
    Formula(
        "16",
        "gradient in b after one step of b, a held fixed (printed: proportional to)",
        "DEEP, a held: gradient after a step",
        A * (1 - ALPHA * A**2) ** 2 * ERROR,
        note="Holds with equality.",
    ),
    Formula(
        "17",
        "meta-step of b, a held fixed in the inner step",
        "DEEP, a held: meta-step",
        B - BETA * A * (1 - ALPHA * A**2) ** 2 * ERROR,
    ),
    Formula("18", "inner step of b", "DEEP: step of b", B - ALPHA * A * ERROR),
    Formula("19", "inner step of a", "DEEP: step of a", A - ALPHA * B * ERROR),
    Formula(
        "20",
        "inner step of b from the solution, or from any b, a held fixed",
        "DEEP, a held: step from any b",
        ROOT * THETA,
        note="Exact for every b.",
    ),
    Formula(
        "20 in 40",
        "slope after the inner step of equation 40, which adapts a too, from any b",
        "DEEP: slope after a step from any b",
        THETA,
        THETA * (1 - ALPHA * B**2 + ALPHA * ROOT * B * THETA),
        note='Equation 20 holds a fixed. In MAML, which adapts a too, "any random b" does not hold.',
    ),
    Formula(
        "20 in 40",
        "the same from b = 0",
        "DEEP: slope after a step from the solution",
        THETA,
    ),
    Formula(
        "4.5",
        "update of SHALLOW at its solution by one sampled task",
        "SHALLOW: meta-step from 0",
        -ALPHA * THETA,
        BETA * (1 - ALPHA) ** 2 * THETA,
        note="Equation 13 at c = 0. The drift is real; its sign, rate and factor are not those printed.",
    ),
    Formula(
        "4.5",
        "update 17 of DEEP at its solution: b stays 0 for any task",
        "DEEP, a held: meta-step at the solution",
        sp.Integer(0),
    ),
    Formula(
        "4.5",
        "the same with a adapted too: gradient of any task in (a, b)",
        "DEEP: gradient after a step at the solution",
        sp.zeros(2, 1),
        note="One step gives the slope theta, so every task is at its minimum.",
    ),
    Formula(
        "4.5",
        "gradient in b there for sampled examples, with second moments S (support) and Q (query)",
        "DEEP, a held: gradient of sampled tasks at the solution",
        sp.Integer(0),
        (QXX * SXY - QXY) * (1 - SXX) / ROOT,
        note="Stationary for population losses, not for SGD on samples.",
    ),
)

APPENDIX = (
    Formula("31", "gradient, SHALLOW", "SHALLOW: gradient", C - THETA),
    Formula(
        "32",
        "loss after one step, SHALLOW",
        "SHALLOW: loss after a step",
        TaskMean((Y - K * X) ** 2),
        TaskMean((Y - K * X) ** 2) / 2,
        note="The 1/2 of equation 30 is missing.",
    ),
    Formula(
        "33",
        "loss after one step, SHALLOW",
        "SHALLOW: loss after a step",
        K**2 - 2 * K * THETA,
        (K**2 - 2 * K * THETA + THETA**2 + 1) / 2,
        (THETA,),
        note="The dropped terms do not depend on c.",
    ),
    Formula("36", "gradient in a, DEEP", "DEEP: gradient in a", A * B**2 - B * THETA),
    Formula("37", "gradient in b, DEEP", "DEEP: gradient in b", A**2 * B - A * THETA),
    Formula("38", "inner step of a", "DEEP: step of a", A - ALPHA * B * ERROR),
    Formula("39", "inner step of b", "DEEP: step of b", B - ALPHA * A * ERROR),
    Formula("40, 41", "MAML loss, DEEP", "DEEP: MAML loss", MetaMean(TaskMean((Y - F * X) ** 2)) / 2),
    Formula(
        "42",
        "MAML loss, DEEP",
        "DEEP: MAML loss",
        MetaMean(THETA**2 - 2 * THETA + F**2) / 2,
        MetaMean(THETA**2 - 2 * THETA * F + F**2 + 1) / 2,
        note="Two slips: f in the cross term, and the variance of the noise.",
    ),
    Formula(
        "43",
        "MAML loss, DEEP",
        "DEEP: MAML loss",
        HALF + MetaMean(F**2) / 2 - MetaMean(THETA * F) / 2,
        1 + MetaMean(F**2) / 2 - MetaMean(THETA * F),
        note="Two slips: the factor of the cross term, and the variance of the noise.",
    ),
    Formula(
        "44",
        "square of f",
        "DEEP: squared slope",
        (A * B - ALPHA * A**2 * ERROR - ALPHA * B**2 * ERROR + ALPHA**2 * A * B * ERROR**2) ** 2,
    ),
    Formula(
        "45",
        "square of f",
        "DEEP: squared slope",
        (A * B - ALPHA * (A**2 + B**2) * ERROR + ALPHA**2 * ERROR**2) ** 2,
        (A * B - ALPHA * (A**2 + B**2) * ERROR + ALPHA**2 * A * B * ERROR**2) ** 2,
        note="The factor ab of the last term is missing; equation 46 follows from 44.",
    ),
    Formula(
        "46",
        "square of f",
        "DEEP: squared slope",
        (
            A * B
            - ALPHA * (A**2 + B**2) * A * B
            + ALPHA**2 * A**3 * B**3
            + (ALPHA * (A**2 + B**2) - 2 * ALPHA**2 * A**2 * B**2) * THETA
            + ALPHA**2 * A * B * THETA**2
        )
        ** 2,
    ),
    Formula("47", "square of f", "DEEP: squared slope", (P1 + P2 * THETA + P3 * THETA**2) ** 2),
    Formula("49", "p1", "DEEP: p1", A * B - ALPHA * (A**2 + B**2) * A * B + ALPHA**2 * A**3 * B**3),
    Formula("49", "p2", "DEEP: p2", ALPHA * (A**2 + B**2) - 2 * ALPHA**2 * A**2 * B**2),
    Formula("49", "p3", "DEEP: p3", ALPHA**2 * A * B),
    Formula("50", "mean square of f", "DEEP: mean squared slope", P1**2 + P2**2 + 3 * P3**2 + 2 * P1 * P3),
    Formula("51", "second, third and fourth moment of theta", "moments of theta", sp.Matrix([1, 0, 3])),
    Formula("52", "mean of theta times f", "DEEP: mean of theta times slope", P2),
    Formula(
        "53",
        "MAML loss, DEEP",
        "DEEP: MAML loss",
        (1 + P1**2 + P2**2 + 3 * P3**2 + 2 * P1 * P3 - 2 * P2) / 2,
        (2 + P1**2 + P2**2 + 3 * P3**2 + 2 * P1 * P3 - 2 * P2) / 2,
        note="The variance of the noise is missing. The cross term contradicts equation 43, and is right.",
    ),
    Formula(
        "Matlab",
        "L of the code after equation 53",
        "DEEP: MAML loss",
        P1**2 + P2**2 + 3 * P3**2 + 2 * P1 * P3 - 2 * P2,
        (2 + P1**2 + P2**2 + 3 * P3**2 + 2 * P1 * P3 - 2 * P2) / 2,
        note="The 1/2 of equation 53 is missing: every derivative below is twice the right one.",
    ),
    Formula(
        "54",
        "gradient of DEEP's MAML loss at b = 0",
        "DEEP: MAML gradient on the a-axis",
        sp.Matrix([4 * ALPHA * A * (ALPHA * A**2 - 1), 0]),
        sp.Matrix([2 * ALPHA * A * (ALPHA * A**2 - 1), 0]),
    ),
    Formula(
        "55",
        "Hessian at the origin",
        "DEEP: Hessian at the origin",
        sp.diag(-4 * ALPHA, -4 * ALPHA),
        sp.diag(-2 * ALPHA, -2 * ALPHA),
    ),
    Formula(
        "56",
        "Hessian at the solutions on the a-axis",
        "DEEP: Hessian on the a-axis",
        sp.diag(8 * ALPHA, 6 * ALPHA**3),
        sp.diag(4 * ALPHA, 3 * ALPHA**3),
    ),
    Formula(
        "57",
        "Hessian at the solutions on the b-axis",
        "DEEP: Hessian on the b-axis",
        sp.diag(6 * ALPHA**3, 8 * ALPHA),
        sp.diag(3 * ALPHA**3, 4 * ALPHA),
    ),
)

ALGORITHM = (
    Formula(
        "Alg. 1, line 8",
        "step of SHALLOW by the meta-optimizer U(g) = xi g",
        "meta-optimizer: step",
        C - XI * (C - THETA),
        C - ALPHA * XI * (C - THETA),
        exact=True,
        note="The inner rate of equation 22 is missing.",
    ),
    Formula(
        "Alg. 1, lines 11, 12",
        "gradients in (c, xi) of the loss at step T = 1, SHALLOW with U(g) = xi g",
        "meta-optimizer: gradient after a step",
        sp.Matrix([C - THETA, 0]),
        sp.Matrix([(1 - ALPHA * XI) ** 2 * (C - THETA), -ALPHA * (1 - ALPHA * XI) * (C - THETA) ** 2]),
        note="The loss belongs to step T + 1: at step T = 1 nothing is adapted, and xi is never learned.",
    ),
)
