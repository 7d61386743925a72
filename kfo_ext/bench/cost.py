"""Operations and bytes of an update, from the cost model of `csrc/plan.h`: float32, a factor per task."""

from __future__ import annotations

import importlib

from kfo_ext.bench.cases import ORDERS
from kfo_ext.bench.points import Point

FLOAT32 = 4


def flops(point: Point, order: str) -> float:
    """Count the operations of one call if every output is required.

    A sequence of k transforms costs k times one; in its double backward, the gradient from each transform but the first
    also runs back through the earlier ones, which adds one backward for each.

    Args:
        point: what is measured.
        order: its order.

    Returns:
        The number of operations.
    """
    plan, number = importlib.import_module("kfo_ext._plan"), ORDERS.index(order) + 1
    work = point.transforms * plan.flops(point.problems.flat, point.tasks, number)
    if order == "double_backward":
        work += (point.transforms - 1) * plan.flops(point.problems.flat, point.tasks, number - 1)
    return work


def bytes_moved(point: Point, order: str) -> float:
    """Bytes that one call must move: each operand read once, each output written once, no intermediates."""
    plan = importlib.import_module("kfo_ext._plan")
    factor_rows = point.tasks * (point.hidden + 1)
    return plan.bytes(point.problems.flat, point.tasks, ORDERS.index(order) + 1, factor_rows, FLOAT32)


def launches(point: Point, order: str) -> int:
    """The number of kernels that the compiled CUDA library launches for one call of a plain transform."""
    plan = importlib.import_module("kfo_ext._plan")
    return len(plan.cuda_launches(point.problems.flat, point.tasks, ORDERS.index(order) + 1, FLOAT32))
