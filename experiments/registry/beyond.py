"""Beyond the paper, on Omniglot, CNN(2): what changes one thing at the settings that the headline found."""

from __future__ import annotations

from ..entry import Entry
from ..jobs import Test
from .budgets import FINAL, following
from .omniglot import BASE, PAPER_KFO, PAPER_MAML

GROUP = "beyond"
ITERATIONS = 2000
SMOKE_MSGD = {**BASE, "method": "maml", "update": "meta_sgd", "fast_lr": 0.5, "meta_lr": 0.001, "init": "torch"}
# Of low rank, which has none of KFO's options but `adapt_update`.
OF_KFO = ("psd", "hidden_layers", "bias", "max_factor", "per_step")
RANKS = {f"rank {rank}": {"update": "low_rank", "rank": rank} for rank in (1, 2, 4, 8, 16)}
FEWER_STEPS = {f"{steps} steps": {"steps": steps} for steps in (1, 2, 3, 4)}
# As many as in training, and five.
STEP_TESTS = (*FINAL, Test(tasks=1000, changes={"steps": 5}))
SMOKE_RANK = {name: value for name, value in PAPER_KFO.items() if name not in OF_KFO}

ENTRIES = [
    Entry(
        name="beyond-low-rank",
        title="low-rank updates in place of KFO",
        group=GROUP,
        baseline="omniglot-cnn2-kfo",
        data=("omniglot",),
        works=following("omniglot-cnn2-kfo", RANKS, SMOKE_RANK, cpu=ITERATIONS, without=OF_KFO),
    ),
    Entry(
        name="beyond-kfo-steps",
        title="META-KFO with fewer inner steps",
        group=GROUP,
        baseline="omniglot-cnn2-kfo",
        data=("omniglot",),
        works=following("omniglot-cnn2-kfo", FEWER_STEPS, PAPER_KFO, cpu=ITERATIONS, tests=STEP_TESTS),
    ),
    Entry(
        name="beyond-maml-steps",
        title="MAML with fewer inner steps",
        group=GROUP,
        baseline="omniglot-cnn2-maml",
        data=("omniglot",),
        works=following("omniglot-cnn2-maml", FEWER_STEPS, PAPER_MAML, cpu=ITERATIONS, tests=STEP_TESTS),
    ),
    Entry(
        name="beyond-msgd-per-step",
        title="Meta-SGD with rates for each step",
        group=GROUP,
        baseline="omniglot-cnn2-msgd",
        data=("omniglot",),
        works=following("omniglot-cnn2-msgd", {"per step": {"per_step": True}}, SMOKE_MSGD, cpu=ITERATIONS),
    ),
]
