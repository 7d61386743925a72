"""Drawn tasks: Figure 1 right, Figures B.1 and B.3, and the claim of appendix B.4."""

from __future__ import annotations

from ..computed import binary_logistic
from ..entry import UNKNOWN, Computed, Entry, Published

FULL = Computed(function=binary_logistic, options={"seeds": 3, "iterations": 3000, "tasks": 1000})
LONGER = Computed(function=binary_logistic, options={"seeds": 5, "iterations": 3000, "tasks": 1000})

ENTRIES = [
    Entry(
        name="logistic",
        title="binary logistic regression, with and without linear layers",
        group="figure-1-right",
        published=(
            Published("Figure 1 right", None, UNKNOWN),
            Published("Figure B.1", None, UNKNOWN),
            Published("Figure B.3", None, UNKNOWN),
        ),
        works={
            "ci": Computed(function=binary_logistic, options={"seeds": 1, "iterations": 2, "tasks": 64}),
            "cpu": FULL,
            "gpu": LONGER,
            "paper": LONGER,
        },
        choices=(
            "labels 1[theta^T x > 0], which the caption's `linear separable` needs; the text draws them",
            "support sets of 10 and 100 examples, 100 queries: the paper states neither",
        ),
    ),
]
