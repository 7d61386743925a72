"""Drawn tasks: Figures 1 and 2, Figures B.1 and B.3, and the claim of appendix B.4."""

from __future__ import annotations

from ..computed import binary_logistic, landscape, regression
from ..entry import UNKNOWN, Computed, Entry, Published

FULL = Computed(function=binary_logistic, options={"seeds": 3, "iterations": 3000, "tasks": 1000})
REGRESSION = Computed(function=regression, options={"seeds": 3, "iterations": 500})
LANDSCAPE = Computed(function=landscape, options={"iterations": 2000})
LONGER = Computed(function=binary_logistic, options={"seeds": 5, "iterations": 3000, "tasks": 1000})

ENTRIES = [
    Entry(
        name="regression",
        title="linear regression in one dimension, SHALLOW and DEEP",
        group="figure-1-left",
        published=(Published("Figure 1 left", None, UNKNOWN),),
        works={
            "ci": Computed(function=regression, options={"seeds": 1, "iterations": 2}),
            "cpu": REGRESSION,
            "gpu": REGRESSION,
            "paper": REGRESSION,
        },
        choices=("16 tasks in a meta-iteration, 100 examples in a support set: the paper states neither",),
    ),
    Entry(
        name="landscape",
        title="the MAML loss of DEEP, and four trajectories",
        group="figure-2",
        published=(Published("Figure 2", None, UNKNOWN),),
        works={
            "ci": Computed(function=landscape, options={"iterations": 2}),
            "cpu": LANDSCAPE,
            "gpu": LANDSCAPE,
            "paper": LANDSCAPE,
        },
    ),
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
