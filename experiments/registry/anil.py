"""Omniglot, CNN(2), with only the head adapted: Tables 2 and B.4."""

from __future__ import annotations

from typing import Any

from ..entry import Entry, Published
from ..jobs import Settings
from .budgets import following, tuned
from .omniglot import BASE, KFO_RATES, SCALE, SCALED
from .published import cnn2

ANIL = {**BASE, "method": "anil", "update": "none"}
KFO = {**ANIL, "update": "kfo", "adapt_update": True}
KFO_HIDDEN = {**KFO, "hidden_layers": 2, "bias": True}
RUNGS = (200, [(500, 4), (1500, 2), (5000, 1)])
RATES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


def _entry(name: str, title: str, column: str, cell: tuple[str, str, float], **facts: Any) -> Entry:
    """Make a row of Table B.4, or of a group in `facts`.

    Args:
        name: of the entry.
        title: of the row.
        column: of tables D.6 and D.7.
        cell: table, column and number of its first row.
        facts: further fields of the entry.

    Returns:
        The entry.
    """
    table, where, number = cell
    return Entry(
        **{
            "name": f"omniglot-{name}",
            "title": title,
            "group": "table-b4",
            "published": (Published(f"Table {table}, Omniglot, {where}", number),),
            "rates": cnn2("Omniglot", column),
            "baseline": "" if name == "anil" else "omniglot-anil",
            "data": ("omniglot",),
            **facts,
        }
    )


def _tuned(
    name: str, title: str, column: str, cell: tuple[str, str, float], base: Settings, rates: Any = RATES, **facts: Any
) -> Entry:
    """A row whose rates are tuned, the outer one starting at the paper's."""
    outer = {"meta_lr": cnn2("Omniglot", column).outer.value}
    return _entry(name, title, column, cell, works=tuned({**base, **outer}, rates, cpu=RUNGS), **facts)


KFO_CELL = ("B.4", "KFO", 94.4)
MSGD, MC = {**ANIL, "update": "meta_sgd"}, {**ANIL, "update": "meta_curvature"}
SMOKE = {**KFO_HIDDEN, "fast_lr": 0.1, "meta_lr": 0.001, "init": "torch"}
ENTRIES = [
    _tuned("anil", "ANIL", "ANIL", ("B.4", "ANIL", 91.0), ANIL),
    _tuned(
        "anil-linnet",
        "ANIL with LinNet",
        "ANIL + LinNet",
        ("2", "w/ LinNet", 93.02),
        {**ANIL, "method": "anil_linnet"},
        group="table-2",
    ),
    _tuned("anil-kfo", "ANIL, META-KFO", "ANIL + KFO", KFO_CELL, KFO, KFO_RATES),
    _tuned("anil-msgd", "ANIL, Meta-SGD", "ANIL + MSGD", ("B.4", "MSGD", 92.47), MSGD),
    _tuned("anil-mc", "ANIL, Meta-Curvature", "ANIL + MC", ("B.4", "MC", 92.67), MC),
    _tuned(
        "anil-kfo-hidden",
        "ANIL, META-KFO, two hidden layers, with bias",
        "ANIL + KFO",
        KFO_CELL,
        KFO_HIDDEN,
        KFO_RATES,
    ),
    _entry(
        "anil-kfo-scaled",
        "ANIL, META-KFO, two hidden layers, with bias and scale",
        "ANIL + KFO",
        KFO_CELL,
        works=following("omniglot-anil-kfo-hidden", SCALED, SMOKE, cpu=5000, seeds=3),
        baseline="omniglot-anil-kfo-hidden",
        choices=(SCALE,),
    ),
]
