"""Softmax regression of pixels, with and without LinNet: Figures 3 and B.2."""

from __future__ import annotations

from ..entry import DATA_SETS, UNKNOWN, Entry, Published
from ..jobs import Settings, Test
from .budgets import FINAL, tuned
from .published import linear

GROUP = "figure-3"
RUNGS = (300, [(1000, 2), (3000, 1)])
# The paper's mini-ImageNet is not available here; grocery84 has its layout, and appears under its own name.
DATA: dict[str, Settings] = {
    "omniglot": {"dataset": "omniglot"},
    "cifar_fs": {"dataset": "cifar_fs"},
    "grocery84": {"dataset": "csv_images", "side": 32},
}
FIGURES = {"omniglot": "Figure 3", "cifar_fs": "Figure 3", "grocery84": "Figure B.2, of mini-ImageNet"}
# Rows of table D.5.
ROWS = {"omniglot": "Omniglot", "cifar_fs": "CIFAR-FS", "grocery84": "mini-ImageNet"}
# Inner rates around the paper's (table D.5).
RATES = {
    "omniglot": ((0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)),
    "cifar_fs": ((0.0025, 0.005, 0.01, 0.02, 0.04, 0.08), (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)),
    "grocery84": ((0.0025, 0.005, 0.01, 0.02, 0.04, 0.08), (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)),
}
META_LR = {"omniglot": (0.0005, 0.0005), "cifar_fs": (0.0005, 0.0001), "grocery84": (0.0005, 0.0005)}
WIDTHS = "256,128,64,64"
# Appendix B.4: no gap between training and test classes.
TESTS = (*FINAL, Test(tasks=1000, split="train"))
STEPS = "five inner steps; the paper does not say how many its linear models take"


def _entry(name: str, linnet: bool) -> Entry:
    method = {"method": "linnet", "widths": WIDTHS} if linnet else {"method": "maml"}
    base = {**DATA[name], "network": "linear", "update": "none", **method, "meta_lr": META_LR[name][linnet]}
    return Entry(
        name=f"{name}-softmax{'-linnet' if linnet else ''}",
        title=f"{DATA_SETS[name]}, softmax regression{' with LinNet' if linnet else ''}",
        group=GROUP,
        published=(Published(FIGURES[name], None, UNKNOWN),),
        rates=linear(ROWS[name], f"LR{' + LinNet' if linnet else ''}"),
        baseline=f"{name}-softmax" if linnet else "",
        data=(name,),
        works=tuned(base, RATES[name][linnet], (), cpu=RUNGS, tests=TESTS),
        choices=(STEPS,),
    )


ENTRIES = [_entry(name, linnet) for name in DATA for linnet in (False, True)]
