"""Lower and upper references of the paper's numbers: nearest class means, prototypical networks, upper lines."""

from __future__ import annotations

from typing import Any

from .. import shown
from ..computed import floors, upper_line
from ..entry import DATA_SETS, Entry
from .budgets import computed

DATA: dict[str, dict[str, Any]] = {
    "omniglot": {"family": "omniglot"},
    "cifar_fs": {"family": "cifar_fs"},
    "grocery84": {"family": "csv_images", "side": 32},
}
# All images of a class: 20, 600, and for grocery84 the size of the smallest class.
IMAGES = {
    "omniglot": {"shots": 15, "queries": 5},
    "cifar_fs": {"shots": 500, "queries": 100},
    "grocery84": {"shots": 30, "queries": 5},
}
# Prototypical networks, and their meta-iterations.
TRAINED = {"omniglot": (3, 2000), "cifar_fs": (2, 1000), "grocery84": (0, 100)}
TASKS = {"omniglot": 300, "cifar_fs": 50, "grocery84": 300}


def _floors(name: str) -> Entry:
    seeds, iterations = TRAINED[name]
    shared = {"data": name, "options": DATA[name]}
    full = {**shared, "tasks": 1000, "seeds": seeds, "iterations": iterations, "every": 100, "validation_tasks": 300}
    smoke = {**shared, "tasks": 2, "seeds": min(1, seeds), "iterations": 2, "every": 2, "validation_tasks": 2}
    return Entry(
        name=f"{name}-floors",
        title=f"{DATA_SETS[name]}: nearest class means of pixels{', prototypical networks' if seeds else ''}",
        group="floors",
        data=(name,),
        works=computed(floors, shown.floors, smoke, full),
    )


def _upper_line(name: str) -> Entry:
    shared = {"data": name, "options": {**DATA[name], **IMAGES[name]}}
    smoke = {"data": name, "options": DATA[name], "tasks": 2, "validation_tasks": 1}
    full = {**shared, "tasks": TASKS[name], "validation_tasks": 20}
    return Entry(
        name=f"{name}-upper-line",
        title=f"{DATA_SETS[name]}: softmax regression on all images of the classes",
        group="figure-3",
        data=(name,),
        works=computed(upper_line, shown.upper_line, smoke, full),
        choices=("the penalty of the weights is chosen on validation classes; the paper says `sufficient data`",),
    )


ENTRIES = [*map(_upper_line, DATA), *map(_floors, DATA)]
