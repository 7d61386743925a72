"""What one call costs before any arithmetic: the orders on tiny operands, gradients on, for pytest-benchmark.

Meant to stay below 12, 18 and 22 us for the three orders; read the median.
"""

from __future__ import annotations

import pytest
import torch

from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.measure import TOLERANCE
from kfo_ext.bench.orders import error_of, packed_already, truth
from kfo_ext.bench.providers import kfo_gradients_on
from kfo_ext.bench.timing import environment
from kfo_ext.testing import CASES
from kfo_ext.transform import Problems

TARGET_US = {"forward": 12, "backward": 18, "double_backward": 22}


@pytest.mark.parametrize("order", ORDERS)
def test_host_overhead(benchmark, order):
    problems = Problems(CASES["bias"])
    case = random_case(problems, 1, torch.float32)
    call = kfo_gradients_on(case)[order]
    error = error_of(packed_already, order, call(), case, truth(case))
    assert error <= TOLERANCE
    benchmark.group = "host time of one call"
    benchmark.extra_info.update(
        target_us=TARGET_US[order], shapes=CASES["bias"], tasks=1, error=error, machine=environment()
    )
    benchmark(call)
