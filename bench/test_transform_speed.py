"""The orders by every provider, for pytest-benchmark: `pytest bench --benchmark-only`.

pytest bench --benchmark-only --benchmark-autosave; pytest-benchmark compare
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kfo_ext.bench import cost
from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.measure import TOLERANCE, one_line
from kfo_ext.bench.orders import error_of, truth
from kfo_ext.bench.points import GROUPS, TASKS, Point
from kfo_ext.bench.providers import PROVIDERS
from kfo_ext.bench.result import environment

# Warnings of other libraries, such as torch's inductor, end no benchmark.
pytestmark = pytest.mark.filterwarnings("default")


@cache
def case_of(group: str):
    """A case and its truth."""
    case = random_case(GROUPS[group], TASKS, torch.float32)
    return case, truth(case)


@cache
def orders_of(group: str, name: str):
    """The orders of a provider, or the reason for none."""
    try:
        PROVIDERS[name].check(torch.device("cpu"))
        return PROVIDERS[name].make(case_of(group)[0])
    except Exception as error:  # any error is a finding
        return one_line(error)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", ["CNN(2)", "CNN(4)"])
def test_order(benchmark, group, order, name):
    orders = orders_of(group, name)
    if isinstance(orders, str):
        pytest.skip(orders)
    if (name, order) == ("torch-compile", "double_backward"):
        pytest.skip("torch.compile has no double backward")
    case, expected = case_of(group)
    error = error_of(PROVIDERS[name].pack, order, orders[order](), case, expected)
    assert error <= TOLERANCE
    point = Point("tasks", TASKS, group, case.problems)
    benchmark.group = f"{order} {group}, {TASKS} tasks"
    benchmark.extra_info.update(
        flops=cost.flops(point, order),
        bytes=cost.bytes_moved(point, order),
        shapes=[list(shape) for shape in case.problems.shapes],
        tasks=TASKS,
        dtype="float32",
        error=error,
        machine=environment(),
    )
    benchmark(orders[order])
