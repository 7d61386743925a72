"""The fixed cost of one call, with tiny operands that require gradients, for pytest-benchmark; medians count.

operator              a call of the operator of each order; targets are 12, 18 and 22 us
through autograd      `transform()`, and `torch.autograd.grad` through it, including the engine: for information
empty Function        torch's minimum for either, on the same machine at the same time
"""

from __future__ import annotations

import pytest
import torch

from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.host import HOST_US, SHAPES, Empty, empty_call, leaves, operator_calls
from kfo_ext.bench.measure import TOLERANCE
from kfo_ext.bench.orders import error_of, packed_already
from kfo_ext.bench.orders import truth as truth_of_case
from kfo_ext.bench.providers import kfo_gradients_on
from kfo_ext.bench.result import environment
from kfo_ext.problems import Problems
from kfo_ext.testing import OUTPUTS, relative_error, truth

OPERATOR = "host time of one call: operator"
THROUGH_AUTOGRAD = "host time of one call: through autograd"


def run(benchmark, call, group: str, error: float, **extra) -> None:
    assert error <= TOLERANCE
    benchmark.group = group
    benchmark.extra_info.update(shapes=SHAPES, tasks=1, error=error, machine=environment(), **extra)
    benchmark(call)


@pytest.mark.parametrize("order", ORDERS)
def test_operator(benchmark, order):
    calls, operands = operator_calls(), leaves()
    outputs = calls[order]()
    outputs = [outputs] if order == "forward" else outputs
    assert all(output.requires_grad for output in outputs)
    expected = truth(operands, SHAPES)
    error = max(relative_error(output, expected[name]) for output, name in zip(outputs, OUTPUTS[order], strict=True))
    run(benchmark, calls[order], OPERATOR, error, target_us=HOST_US[order])


@pytest.mark.parametrize("order", ORDERS)
def test_through_autograd(benchmark, order):
    case = random_case(Problems(SHAPES), 1, torch.float32)
    call = kfo_gradients_on(case)[order]
    run(benchmark, call, THROUGH_AUTOGRAD, error_of(packed_already, order, call(), case, truth_of_case(case)))


def test_empty_function(benchmark):
    run(benchmark, empty_call(), OPERATOR, 0.0)


def test_empty_function_through_autograd(benchmark):
    R, G, L, dY, *_ = leaves()
    Y = Empty.apply(R, G, L)
    call = lambda: torch.autograd.grad(Y, (R, G, L), dY, create_graph=True)  # noqa: E731
    run(benchmark, call, THROUGH_AUTOGRAD, 0.0)
