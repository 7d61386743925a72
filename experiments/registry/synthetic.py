"""Generated tasks: Figures 1 and 2, Figures B.1 and B.3, and the claim of appendix B.4."""

from __future__ import annotations

from .. import shown
from ..computed import binary_logistic, landscape, regression
from ..entry import UNKNOWN, Entry, Published
from .budgets import computed

SMOKE = {"seeds": 1, "iterations": 2, "tasks": 64}
FULL = {"seeds": 3, "iterations": 3000, "tasks": 1000}

ENTRIES = [
    Entry(
        name="regression",
        title="linear regression in one dimension, SHALLOW and DEEP",
        group="figure-1-left",
        published=(Published("Figure 1 left", None, UNKNOWN),),
        works=computed(regression, shown.regression, {"seeds": 1, "iterations": 2}, {"seeds": 3, "iterations": 500}),
        choices=("16 tasks in a meta-iteration, 100 examples in a support set: the paper states neither",),
    ),
    Entry(
        name="landscape",
        title="the MAML loss of DEEP, and four trajectories",
        group="figure-2",
        published=(Published("Figure 2", None, UNKNOWN),),
        works=computed(landscape, shown.landscape, {"iterations": 2}, {"iterations": 2000}),
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
        works=computed(
            binary_logistic,
            shown.logistic,
            {"seeds": 1, "iterations": 2, "tasks": 64},
            {"seeds": 3, "iterations": 3000, "tasks": 1000},
        ),
        choices=(
            "labels 1[theta^T x > 0], which the caption's `linear separable` needs; the text draws them",
            "support sets of 10 and 100 examples, 100 queries: the paper states neither",
        ),
    ),
]
