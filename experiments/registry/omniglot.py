"""Omniglot, CNN(2), all parameters adapted: the headline, Table 3's first row, and Table 1's at two layers."""

from __future__ import annotations

from ..entry import UNKNOWN, Entry, Published
from ..jobs import Settings, Test
from .budgets import FINAL, STARTS, fixed, tuned
from .published import cnn2

GROUP = "table-3"
BASE = {"dataset": "omniglot", "network": "omniglot_cnn", "layers": 2, "hidden": 32}
MAML = {**BASE, "method": "maml", "update": "none"}
KFO = {**BASE, "method": "maml", "update": "kfo", "psd": True, "hidden_layers": 0, "adapt_update": True}
RUNGS = (200, [(400, 4), (800, 2), (2000, 1)])
# The paper's rates (table D.6) and larger ones; those of the other methods as many, around the paper's.
RATES = (0.08, 0.25, 0.5, 1.0, 1.5, 2.0)
KFO_RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
LINNET_RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
# Other numbers of inner steps than in training.
STEPS = tuple(Test(tasks=1000, changes={"steps": steps}) for steps in (1, 2, 3, 4, 10))
THREE_STARTS = (*STARTS, "zero_head")


def table3(column: str, value: float | None, certainty: str = "certain") -> tuple[Published, ...]:
    """A cell of the table's first row."""
    return (Published(f"Table 3, Omniglot, {column}", value, certainty),)


# One factor at a time, from the paper's own setting.
CONTROLS: dict[str, Settings] = {
    "clipped": {"clip_norm": 1.0},
    "outer rate 0.001": {"meta_lr": 0.001},
    "torch's start": {"init": "torch"},
}
PAPER_MAML = {**MAML, "fast_lr": 0.08, "meta_lr": 0.003, "init": "reference"}
PAPER_KFO = {**KFO, "fast_lr": 0.1, "meta_lr": 0.003, "init": "reference"}
START = "the start of the network: the best of three (torch's, the reference's, a zero head); the paper names none"

ENTRIES = [
    Entry(
        name="omniglot-cnn2-maml",
        title="MAML",
        group=GROUP,
        published=table3("MAML", 66.6),
        rates=cnn2("Omniglot", "MAML"),
        data=("omniglot",),
        works=tuned({**MAML, "meta_lr": 0.003}, RATES, THREE_STARTS, cpu=RUNGS, tests=(*FINAL, *STEPS)),
        choices=(START,),
    ),
    Entry(
        name="omniglot-cnn2-kfo",
        title="META-KFO, linear",
        group=GROUP,
        published=table3("META-KFO", 96.62),
        rates=cnn2("Omniglot", "MAML + KFO"),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**KFO, "meta_lr": 0.003}, KFO_RATES, THREE_STARTS, cpu=RUNGS, tests=(*FINAL, *STEPS)),
        choices=(START, "one Kronecker layer, psd, adapted; the paper does not say which of its numbers are linear"),
    ),
    Entry(
        name="omniglot-cnn2-maml-paper",
        title="MAML at the paper's setting",
        group=GROUP,
        published=table3("MAML", 66.6),
        rates=cnn2("Omniglot", "MAML"),
        data=("omniglot",),
        tried=("the tuned row of MAML has other rates and starts",),
        works=fixed(PAPER_MAML, {"": {}}, cpu=2000),
    ),
    Entry(
        name="omniglot-cnn2-kfo-paper",
        title="META-KFO, linear, at the paper's setting",
        group=GROUP,
        published=table3("META-KFO", 96.62),
        rates=cnn2("Omniglot", "MAML + KFO"),
        baseline="omniglot-cnn2-maml-paper",
        data=("omniglot",),
        tried=(
            "the tuned row has other rates and starts",
            "the controls change clipping, outer rate and start, one at a time",
        ),
        works=fixed(PAPER_KFO, {"": {}}, cpu=2000),
    ),
    Entry(
        name="omniglot-cnn2-kfo-controls",
        title="META-KFO at the paper's setting, one factor changed",
        group="collapse",
        rates=cnn2("Omniglot", "MAML + KFO"),
        data=("omniglot",),
        works=fixed(PAPER_KFO, CONTROLS, cpu=1000, tests=FINAL),
    ),
    Entry(
        name="omniglot-cnn2-msgd",
        title="Meta-SGD",
        group=GROUP,
        published=table3("MSGD", 74.07),
        rates=cnn2("Omniglot", "MAML + MSGD"),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**BASE, "method": "maml", "update": "meta_sgd", "meta_lr": 0.0005}, RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-cnn2-mc",
        title="Meta-Curvature",
        group=GROUP,
        published=table3("MC", None, UNKNOWN),
        rates=cnn2("Omniglot", "MAML + MC"),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**BASE, "method": "maml", "update": "meta_curvature", "meta_lr": 0.003}, RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-cnn2-tnet",
        title="T-Nets",
        group=GROUP,
        published=table3("T-Nets", 92.27),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**BASE, "method": "tnet", "update": "none", "meta_lr": 0.003}, RATES, cpu=RUNGS),
        choices=("no rate of T-Nets is published: MAML's grid",),
    ),
    Entry(
        name="omniglot-cnn2-kfo-fixed",
        title="META-KFO, linear, factors not adapted",
        group=GROUP,
        rates=cnn2("Omniglot", "MAML + KFO"),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**KFO, "adapt_update": False, "meta_lr": 0.003}, KFO_RATES, cpu=RUNGS),
    ),
    Entry(
        name="omniglot-cnn2-kfo-hidden",
        title="META-KFO, two hidden layers, with bias",
        group=GROUP,
        published=table3("META-KFO", 96.62),
        rates=cnn2("Omniglot", "MAML + KFO"),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**KFO, "hidden_layers": 2, "bias": True, "meta_lr": 0.003}, KFO_RATES, cpu=RUNGS),
        choices=("depth 2 and tanh, residual form: the repository's README says two hidden layers, the paper nothing",),
    ),
    Entry(
        name="omniglot-cnn2-linnet",
        title="LinNet",
        group="table-1",
        published=(Published("Table 1, Omniglot, CNN(2), LinNet", None, UNKNOWN),),
        rates=cnn2("Omniglot", "MAML + LinNet"),
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=tuned({**BASE, "method": "linnet", "update": "none", "meta_lr": 0.003}, LINNET_RATES, cpu=RUNGS),
        choices=("two layers of the head's 32 inputs before it, with bias: the paper gives neither width nor bias",),
    ),
]
