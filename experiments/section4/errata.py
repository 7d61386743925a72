"""Writes docs/errata.md: every formula and claim of section 4 and its appendix, with the verdict computed.

python -m experiments.section4.errata
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import sympy as sp
from sympy.printing.latex import LatexPrinter

from kfo_ext.runs.files import atomic_write

from . import claims, equations, optimizers
from .rows import CONST, Claim, Formula, Row, relation
from .verdicts import CONSTANT, HOLDS, WRONG, Relation

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errata.md"
ROWS: tuple[Row, ...] = (
    *equations.MAIN,
    *claims.MAIN,
    *equations.APPENDIX,
    *claims.APPENDIX,
    *optimizers.CLAIMS,
    *equations.ALGORITHM,
)
HEAD = """# Errata of the paper's analysis

The paper is Arnold, Iqbal and Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot" (AISTATS 2021). This
page checks its section 4, appendix A, appendix C.1 and Algorithm 1. The conclusion of section 4 stands: DEEP adapts
in one step at any inner rate, SHALLOW only at the rate 1. Some formulas on the way are wrong by a factor, a term or a
sign.

A computer algebra system derives each quantity from its definition. The definition is the loss
$\\ell_\\theta = \\frac{1}{2} \\mathbb{E}_{x,y}[(y - \\hat{y})^2]$ with $y = \\theta x + n$, where $\\theta$, $x$ and
the noise $n$ are standard normal. The inner step is one step of gradient descent at the rate $\\alpha$.
SHALLOW is $\\hat{y} = c x$; DEEP is $\\hat{y} = a b x$.

Each verdict is computed from the printed and the derived formula.

- **holds**: the difference simplifies to 0.
- **holds up to a constant**: the printed formula is a positive number times the right one, plus a constant. Minimizers
  and directions of gradients are then the same. The right formula is called $\\rho$ in the relation.
- **does not hold**: no such relation exists, or the statement is false. Where a number matters, as in an inner step, no
  constant is allowed.

CONST is what the paper leaves open; it counts as 0.

Statements that are no formulas have an exact check, which the last column names. "Ours" marks what the paper does not
say. Names: $p_1$, $p_2$, $p_3$ are those of equation 49, $f$ is that of equation 41, and
$k = (1 - \\alpha) c + \\alpha \\theta$. A number such as 4.5 is a section.

No verdict is given on definitions (equations 1 to 7, 21 to 27, 29 and 30), on equation 48, which is empty, and on three
points of Algorithm 1 that are matters of notation: the query set is missing, lines 11 and 12 have one task in place of
a mean over a meta-batch, and "minus Opt" has the optimizer return a step.

`python -m experiments.section4.errata` writes this page. A test compares it, and checks each formula again by
automatic differentiation and sampling.

"""
COLUMNS = "| equation or section | what | printed | verdict | right, or what follows | check |\n" + 6 * "|---" + "|\n"


@cache
def verdicts() -> tuple[tuple[Row, Relation], ...]:
    """Every row with its verdict."""
    return tuple((row, relation(row)) for row in ROWS)


class _Printer(LatexPrinter):
    """Prints negative terms last, as in the paper: y - c x."""

    def _as_ordered_terms(self, expression: sp.Expr, order: str | None = None) -> list[sp.Expr]:
        terms = super()._as_ordered_terms(expression, order=order)
        return sorted(terms, key=lambda term: term.could_extract_minus_sign())


PRINTER = _Printer({"symbol_names": {CONST: r"\text{CONST}"}, "long_frac_ratio": 2})


def latex(expression: Any) -> str:
    """The formula for Markdown, with a matrix as diag(...) and a column in parentheses."""
    if isinstance(expression, sp.MatrixBase):
        if expression.shape[1] == 1:
            return rf"\left({', '.join(map(latex, expression))}\right)"
        assert expression.is_diagonal()
        return rf"\operatorname{{diag}}\left({', '.join(map(latex, expression.diagonal()))}\right)"
    text = PRINTER.doprint(expression)
    # A bar ends a table's cell, and Markdown drops one of two backslashes.
    assert "|" not in text and r"\\" not in text, text
    return text


def page() -> str:
    """The whole page."""
    return HEAD + _summary(verdicts()) + "\n" + COLUMNS + "".join(_line(row, found) for row, found in verdicts())


def _summary(rows: Iterable[tuple[Row, Relation]]) -> str:
    printed = [found.verdict for row, found in rows if not (isinstance(row, Claim) and row.ours)]
    counts = Counter(printed)
    parts = f"{counts[HOLDS]} hold, {counts[CONSTANT]} hold up to a constant, {counts[WRONG]} do not hold"
    return f"Of the {len(printed)} printed formulas and statements below, {parts}.\n"


def _line(row: Row, found: Relation) -> str:
    cells = _formula(row, found) if isinstance(row, Formula) else _claim(row, found)
    return "| " + " | ".join(map(_symbols, cells)) + " |\n"


def _symbols(text: str) -> str:
    """The text with Greek letters outside formulas turned into formulas."""
    parts = text.split("$")
    parts[::2] = [re.sub(r"\b(alpha|theta|xi)\b", r"$\\\1$", part) for part in parts[::2]]
    return "$".join(parts)


def _formula(row: Formula, found: Relation) -> list[str]:
    right = "" if found.verdict == HOLDS or row.right is None else f"${latex(row.right)}$"
    if found.verdict == CONSTANT:
        right += f"; printed $= {_affine(found)}$"
    parts = [part for part in (right, row.note) if part]
    return [row.number, row.about, f"${latex(row.printed)}$", found.verdict, ". ".join(parts), "algebra"]


def _affine(found: Relation) -> str:
    rho = sp.Symbol("rho")
    assert found.factor is not None and found.shift is not None
    return latex(found.factor * rho + found.shift)


def _claim(row: Claim, found: Relation) -> list[str]:
    right = row.right if isinstance(row.right, str) else row.right()
    says, printed = ("", row.says) if not row.ours else (row.says, "")
    return [row.number, f"Ours: {says}" if says else "statement", printed, found.verdict, right, row.how]


def write(path: Path = PAGE) -> None:
    """Write the page."""
    with atomic_write(path) as file:
        file.write(page().encode())


if __name__ == "__main__":
    write()
    print(PAGE)
