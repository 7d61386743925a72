"""CIFAR-FS, CNN(2): Tables 2 and B.4 with 8 tasks per meta-iteration, Tables 1 and 3 with 4; and entries not run."""

from __future__ import annotations

from ..entry import CERTAIN, INFERRED, Entry, Published
from .budgets import start_of, tuned
from .published import cnn2

BASE = {"dataset": "cifar_fs", "network": "cifar_fs_cnn", "layers": 2, "hidden": 32}
ANIL_RUNGS = (200, [(400, 4), (1000, 2), (3000, 1)])
MAML_RUNGS = (150, [(500, 2), (2000, 1)])
LINNET = {"method": "anil_linnet", "update": "none", "meta_lr": 0.001}
MSGD = {"update": "meta_sgd"}
MC = {"update": "meta_curvature"}
KFO = {"update": "kfo", "psd": True, "hidden_layers": 0, "adapt_update": True}
# Around the paper's inner rates (table D.6).
ANIL = {
    "anil": ("ANIL", "B.4", "ANIL", 66.1, {"method": "anil", "update": "none", "meta_lr": 0.002}, 0.5),
    "anil-linnet": ("ANIL with LinNet", "2", "w/ LinNet", 67.55, LINNET, 0.5),
    "anil-kfo": ("ANIL, META-KFO", "B.4", "KFO", 68.81, {"method": "anil", **KFO, "meta_lr": 0.001}, 0.1),
    "anil-msgd": (
        "ANIL, Meta-SGD",
        "B.4",
        "MSGD",
        67.55,
        {"method": "anil", **MSGD, "meta_lr": 0.001},
        0.1,
    ),
    "anil-mc": (
        "ANIL, Meta-Curvature",
        "B.4",
        "MC",
        67.43,
        {"method": "anil", **MC, "meta_lr": 0.001},
        0.1,
    ),
}
TABLE_3 = {
    "maml": ("MAML", "MAML", 62.2, CERTAIN, {"method": "maml", "update": "none", "meta_lr": 0.003}, 0.07),
    "kfo": ("META-KFO, linear", "META-KFO", 69.64, CERTAIN, {"method": "maml", **KFO, "meta_lr": 0.003}, 0.1),
    "msgd": ("Meta-SGD", "MSGD", 62.82, CERTAIN, {"method": "maml", **MSGD, "meta_lr": 0.001}, 0.7),
    "tnet": ("T-Nets", "T-Nets", 66.42, CERTAIN, {"method": "tnet", "update": "none", "meta_lr": 0.003}, 0.07),
    "mc": (
        "Meta-Curvature",
        "MC",
        68.37,
        INFERRED,
        {"method": "maml", **MC, "meta_lr": 0.003},
        0.7,
    ),
}
# Columns of tables D.6 and D.7, which have none for T-Nets.
COLUMNS = {
    "maml": "MAML",
    "kfo": "MAML + KFO",
    "msgd": "MAML + MSGD",
    "mc": "MAML + MC",
    "anil": "ANIL",
    "anil-linnet": "ANIL + LinNet",
    "anil-kfo": "ANIL + KFO",
    "anil-msgd": "ANIL + MSGD",
    "anil-mc": "ANIL + MC",
}
SIX = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
COST = "9 to 22 core-seconds a meta-iteration on a CPU: needs a GPU"


def _around(rate: float) -> tuple[float, ...]:
    return tuple(round(factor * rate, 5) for factor in SIX)


def _anil(name: str) -> Entry:
    title, table, column, value, base, rate = ANIL[name]
    return Entry(
        name=f"cifar-{name}",
        title=f"CIFAR-FS, {title}",
        group="table-2" if table == "2" else "table-b4",
        published=(Published(f"Table {table}, CIFAR-FS, {column}", value),),
        rates=cnn2("CIFAR-FS", COLUMNS[name]),
        baseline="" if name == "anil" else "cifar-anil",
        data=("cifar_fs",),
        works=tuned({**BASE, **base}, _around(rate), cpu=ANIL_RUNGS, seeds=2, meta_batch=8),
    )


def _maml(name: str) -> Entry:
    title, column, value, certainty, base, rate = TABLE_3[name]
    return Entry(
        name=f"cifar-cnn2-{name}",
        title=f"CIFAR-FS, {title}",
        group="table-3",
        published=(Published(f"Table 3, CIFAR-FS, {column}", value, certainty),),
        rates=cnn2("CIFAR-FS", COLUMNS[name]) if name in COLUMNS else None,
        baseline="" if name == "maml" else "cifar-cnn2-maml",
        data=("cifar_fs",),
        works=start_of(
            f"omniglot-cnn2-{name}",
            tuned({**BASE, **base}, _around(rate), cpu=MAML_RUNGS, seeds=2, meta_batch=4, validation_every=250),
        ),
    )


def _not_run(layers: int, column: str, value: float, title: str) -> Entry:
    return Entry(
        name=f"cifar-cnn{layers}-{'linnet' if column == 'LinNet' else 'maml'}",
        title=f"CIFAR-FS, CNN({layers}), {title}",
        group="table-1",
        published=(Published(f"Table 1, CIFAR-FS, CNN({layers}), {column}", value),),
        works={},
        why_not=COST,
    )


ENTRIES = [
    *map(_anil, ANIL),
    Entry(
        name="cifar-cnn2-linnet",
        title="CIFAR-FS, CNN(2), LinNet",
        group="table-1",
        published=(Published("Table 1, CIFAR-FS, CNN(2), LinNet", 66.1),),
        rates=cnn2("CIFAR-FS", "MAML + LinNet"),
        baseline="cifar-cnn2-maml",
        works={},
        why_not="left out of the budget: 5 core-seconds a meta-iteration",
    ),
    *map(_maml, TABLE_3),
    *(
        _not_run(layers, column, value, title)
        for column, title, values in (
            ("MAML", "MAML", {3: 68.9, 4: 70.9, 6: 71.3}),
            ("LinNet", "LinNet", {3: 71.1, 4: 74.4, 6: 71.9}),
        )
        for layers, value in values.items()
    ),
]
