"""Exact expectations over the paper's linear regression y = theta x + n with theta, x and n standard normal."""

from __future__ import annotations

from typing import Any

import sympy as sp

THETA = sp.Symbol("theta", real=True)
X = sp.Symbol("x", real=True)
NOISE = sp.Symbol("n", real=True)
TARGET = THETA * X + NOISE


def expectation(expression: sp.Expr, *variables: sp.Symbol) -> sp.Expr:
    """Compute the mean of a polynomial over independent standard normal variables.

    Args:
        expression: a polynomial in the variables.
        *variables: the variables to average over.

    Returns:
        The mean.

    Raises:
        ValueError: there is no variable, or the expression is no polynomial in the variables.
    """
    if not variables:
        raise ValueError("variables: expected at least one symbol to average over, got none")
    expanded = sp.expand(expression)
    if not expanded.is_polynomial(*variables):
        raise ValueError(f"expression: expected a polynomial in {variables}, got {expression}")
    terms = sp.Poly(expanded, *variables).terms()
    return sp.expand(sp.Add(*(factor * sp.Mul(*map(_moment, powers)) for powers, factor in terms)))


def _moment(power: int) -> sp.Expr:
    """E z^power: 0 if odd, else (power - 1)!!."""
    return sp.Integer(0) if power % 2 else sp.factorial2(power - 1)


class TaskMean(sp.Function):
    """E over x and the noise of one task, unevaluated; printed in LaTeX as in the paper."""

    nargs = 1
    averaged: tuple[sp.Symbol, ...] = (X, NOISE)
    subscript = "x,y"

    def _latex(self, printer: Any) -> str:
        return rf"\mathbb{{E}}_{{{self.subscript}}}\left[{printer._print(self.args[0])}\right]"


class MetaMean(TaskMean):
    """E over theta, unevaluated."""

    averaged = (THETA,)
    subscript = r"\theta"


def evaluated(expression: Any) -> Any:
    """The expression, or matrix, with every expectation computed."""
    if isinstance(expression, sp.MatrixBase):
        return expression.applyfunc(evaluated)

    def is_mean(node: sp.Basic) -> bool:
        return isinstance(node, TaskMean)

    # Bottom up: the argument of an outer expectation is evaluated first.
    return sp.sympify(expression).replace(is_mean, lambda node: expectation(node.args[0], *node.averaged))
