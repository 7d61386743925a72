"""Omniglot, CNN(3), CNN(4) and CNN(6): Table 1 and Figures 4 and B.4."""

from __future__ import annotations

from ..entry import CERTAIN, INFERRED, UNKNOWN, Entry, Published
from .budgets import start_of, tuned
from .omniglot import BASE, KFO, KFO_RATES, LINNET_RATES, MAML, RATES

RUNGS = (200, [(400, 2), (2000, 1)])
LINNET = {**BASE, "method": "linnet", "update": "none"}
METHODS = {
    "maml": ("MAML", MAML, RATES),
    "kfo": ("META-KFO, linear", KFO, KFO_RATES),
    "linnet": ("LinNet", LINNET, LINNET_RATES),
}
# Table 1, by method and layers; figure 4 shows no numbers.
TABLE_1: dict[tuple[str, int], tuple[float | None, str]] = {
    ("maml", 4): (98.5, INFERRED),
    ("linnet", 4): (98.1, CERTAIN),
}


def _published(method: str, layers: int) -> tuple[Published, ...]:
    if method == "kfo":
        return (Published(f"Figure 4, Omniglot, CNN({layers}), META-KFO", None, UNKNOWN),)
    value, certainty = TABLE_1.get((method, layers), (None, UNKNOWN))
    column = "LinNet" if method == "linnet" else "MAML"
    return (Published(f"Table 1, Omniglot, CNN({layers}), {column}", value, certainty),)


def _entry(layers: int, method: str) -> Entry:
    title, base, rates = METHODS[method]
    return Entry(
        name=f"omniglot-cnn{layers}-{method}",
        title=f"CNN({layers}), {title}",
        group="figure-4",
        published=_published(method, layers),
        baseline="" if method == "maml" else f"omniglot-cnn{layers}-maml",
        data=("omniglot",),
        works=start_of(
            f"omniglot-cnn2-{method}", tuned({**base, "layers": layers, "meta_lr": 0.003}, rates, cpu=RUNGS)
        ),
        choices=("no rate of these depths is published", "the start that won at CNN(2)"),
    )


ENTRIES = [_entry(layers, method) for layers in (4, 6, 3) for method in METHODS]
