"""Beyond the paper, on Omniglot, CNN(2): one change at a time at the settings that the headline found."""

from __future__ import annotations

from ..entry import Computed, Entry
from ..halving import Halving
from ..jobs import Settings, Test
from ..wall_clock import wall_clock
from ..wall_clock_figure import shown
from .budgets import FINAL, following
from .omniglot import BASE, PAPER_KFO, PAPER_MAML
from .omniglot import ENTRIES as METHODS

GROUP = "beyond"
ITERATIONS = 2000
SMOKE_MSGD = {**BASE, "method": "maml", "update": "meta_sgd", "fast_lr": 0.5, "meta_lr": 0.001, "init": "torch"}
# KFO's options that the low-rank update does not have.
OF_KFO = ("psd", "hidden_layers", "bias", "max_factor", "per_step")
RANKS = {f"rank {rank}": {"update": "low_rank", "rank": rank} for rank in (1, 2, 4, 8, 16)}
FEWER_STEPS = {f"{steps} steps": {"steps": steps} for steps in (1, 2, 3, 4)}
# Of a timed run, which has the machine to itself; the tuned META-KFO reaches 90 % within a few hundred.
TIMED_ITERATIONS = 1000
# Tests with the training's number of steps, and with five.
STEP_TESTS = (*FINAL, Test(tasks=1000, changes={"steps": 5}))
SMOKE_RANK = {name: value for name, value in PAPER_KFO.items() if name not in OF_KFO}
# The methods that are timed, and those of them that learn2learn has.
KINDS = ("maml", "kfo", "kfo-fixed", "kfo-hidden", "msgd", "mc", "tnet", "linnet")
RACE = tuple(f"omniglot-cnn2-{kind}" for kind in KINDS)
PEERS = ("omniglot-cnn2-kfo", "omniglot-cnn2-maml")


def _smoke(entry: Entry) -> Settings:
    """The settings of a tuned entry's run at `ci`."""
    work = entry.works["ci"]
    assert isinstance(work, Halving)
    return {name: value for name, value in work.missing({})[0].settings.items() if name != "seed"}


WALL_CLOCK = {
    "ci": Computed(
        function=wall_clock,
        options={
            "settings": {entry.name: _smoke(entry) for entry in METHODS if entry.name in RACE},
            "target": 0.9,
            "validate_every": 2,
            "validation_tasks": 2,
            "most_iterations": 2,
            "seeds": (0,),
            "threads": 1,
            "peers": (),
        },
    ),
    "cpu": Computed(
        function=wall_clock,
        of=RACE,
        shown=shown,
        options={
            "target": 0.9,
            "validate_every": 25,
            "validation_tasks": 200,
            "most_iterations": TIMED_ITERATIONS,
            "seeds": (0, 1, 2),
            "threads": 2,
            "peers": PEERS,
        },
    ),
}

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
    Entry(
        name="beyond-wall-clock",
        title="seconds to 90 % accuracy",
        group=GROUP,
        data=("omniglot",),
        works=WALL_CLOCK,
        alone=True,
        choices=(
            "each method at the setting that its own entry has found; the clock stands still during validations",
            "learn2learn's GBML with KroneckerTransform and its MAML: same start, rates, Adam, tasks and validations",
        ),
        why_not="its settings and its time are those of budget cpu",
    ),
]
