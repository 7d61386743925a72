"""Learning rates of the paper, tables D.5 to D.7, as far as legible; by data set, then by model or method."""

from __future__ import annotations

from collections.abc import Mapping

from ..entry import CERTAIN, INFERRED, UNKNOWN, Published, Rates

Cell = float | tuple[float, str] | None
LINEAR: Mapping[str, Mapping[str, tuple[Cell, Cell]]] = {
    "synthetic": {"LR": (0.9, 0.01), "LR + LinNet(2)": (0.9, 0.1), "LR + LinNet(3)": (0.9, 0.1)},
    "Omniglot": {"LR": (1.0, 0.0005), "LR + LinNet": (0.08, 0.0005)},
    "CIFAR-FS": {"LR": (0.01, 0.0005), "LR + LinNet": (0.02, 0.0001)},
    # The names of these rows are not legible.
    "mini-ImageNet": {
        "LR": ((0.01, INFERRED), (0.0005, INFERRED)),
        "LR + LinNet": ((0.01, INFERRED), (0.0005, INFERRED)),
    },
}
COLUMNS = tuple(
    f"{method}{update}" for method in ("MAML", "ANIL") for update in ("", " + LinNet", " + MSGD", " + MC", " + KFO")
)
INNER: Mapping[str, tuple[Cell, ...]] = {
    "Omniglot": (0.08, 0.05, 0.5, 0.5, 0.1, 0.5, 0.5, 0.05, 0.05, 0.1),
    "CIFAR-FS": (0.07, 0.01, 0.7, 0.7, 0.1, 0.5, 0.5, 0.1, 0.1, 0.1),
    "mini-ImageNet": (0.001, 0.001, 0.1, 0.05, 0.001, 0.5, 0.5, 0.1, 0.1, 0.1),
}
# The columns of MC and KFO have a single legible value, of an unknown data set.
OUTER: Mapping[str, tuple[Cell, ...]] = {
    "Omniglot": (
        0.003, 0.003, 0.0005, (0.003, INFERRED), (0.003, INFERRED),
        0.001, 0.003, 0.001, 0.001, (0.001, INFERRED),
    ),
    "CIFAR-FS": (
        0.003, 0.003, 0.001, (0.003, INFERRED), (0.003, INFERRED),
        0.002, 0.001, 0.001, 0.001, (0.001, INFERRED),
    ),
    "mini-ImageNet": (0.0005, 0.0005, 0.001, None, None, 0.001, 0.001, 0.001, 0.001, (0.001, INFERRED)),
}  # fmt: skip


def linear(data: str, model: str) -> Rates:
    """Look up the rates of a linear model, Table D.5.

    Args:
        data: data set.
        model: model.

    Returns:
        The inner and the outer rate.

    Raises:
        KeyError: the table has no such row.
    """
    inner, outer = LINEAR[data][model]
    return Rates(_cell(f"Table D.5, {data}, {model}", inner), _cell(f"Table D.5, {data}, {model}", outer))


def cnn2(data: str, method: str) -> Rates:
    """Look up the rates of CNN(2), Tables D.6 and D.7.

    Args:
        data: data set.
        method: one of `COLUMNS`, such as "ANIL + KFO".

    Returns:
        The inner and the outer rate.

    Raises:
        KeyError: the tables have no such row.
        ValueError: they have no such column.
    """
    column = COLUMNS.index(method)
    where = f"{data}, {method}"
    return Rates(_cell(f"Table D.6, {where}", INNER[data][column]), _cell(f"Table D.7, {where}", OUTER[data][column]))


def _cell(where: str, cell: Cell) -> Published:
    if cell is None:
        return Published(where, None, UNKNOWN)
    return Published(where, *cell) if isinstance(cell, tuple) else Published(where, cell, CERTAIN)
