"""Omniglot, CNN(2), the head alone adapted: Tables 2 and B.4."""

from __future__ import annotations

from ..entry import Entry, Published
from .budgets import tuned
from .omniglot import BASE, KFO_RATES
from .published import cnn2

ANIL = {**BASE, "method": "anil", "update": "none"}
RUNGS = (200, [(500, 4), (1500, 2), (5000, 1)])
RATES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)


def cell(table: str, column: str, value: float) -> tuple[Published, ...]:
    """A cell of the table's first row."""
    return (Published(f"Table {table}, Omniglot, {column}", value),)


ENTRIES = [
    Entry(
        name="omniglot-anil",
        title="ANIL",
        group="table-b4",
        published=cell("B.4", "ANIL", 91.0),
        rates=cnn2("Omniglot", "ANIL"),
        data=("omniglot",),
        works=tuned({**ANIL, "meta_lr": 0.001}, RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-anil-linnet",
        title="ANIL with LinNet",
        group="table-2",
        published=cell("2", "w/ LinNet", 93.02),
        rates=cnn2("Omniglot", "ANIL + LinNet"),
        baseline="omniglot-anil",
        data=("omniglot",),
        works=tuned({**ANIL, "method": "anil_linnet", "meta_lr": 0.003}, RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-anil-kfo",
        title="ANIL, META-KFO",
        group="table-b4",
        published=cell("B.4", "KFO", 94.4),
        rates=cnn2("Omniglot", "ANIL + KFO"),
        baseline="omniglot-anil",
        data=("omniglot",),
        works=tuned({**ANIL, "update": "kfo", "adapt_update": True, "meta_lr": 0.001}, KFO_RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-anil-msgd",
        title="ANIL, Meta-SGD",
        group="table-b4",
        published=cell("B.4", "MSGD", 92.47),
        rates=cnn2("Omniglot", "ANIL + MSGD"),
        baseline="omniglot-anil",
        data=("omniglot",),
        works=tuned({**ANIL, "update": "meta_sgd", "meta_lr": 0.001}, RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-anil-mc",
        title="ANIL, Meta-Curvature",
        group="table-b4",
        published=cell("B.4", "MC", 92.67),
        rates=cnn2("Omniglot", "ANIL + MC"),
        baseline="omniglot-anil",
        data=("omniglot",),
        works=tuned({**ANIL, "update": "meta_curvature", "meta_lr": 0.001}, RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-anil-kfo-hidden",
        title="ANIL, META-KFO, two hidden layers, with bias",
        group="table-b4",
        published=cell("B.4", "KFO", 94.4),
        rates=cnn2("Omniglot", "ANIL + KFO"),
        baseline="omniglot-anil",
        data=("omniglot",),
        works=tuned(
            {**ANIL, "update": "kfo", "hidden_layers": 2, "bias": True, "adapt_update": True, "meta_lr": 0.001},
            KFO_RATES,
            cpu=RUNGS,
        ),
    ),
]
