"""How calls run: captured in graphs, on other streams, without waiting for the device, compiled, and after an error."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from kfo_ext.problems import Problems
from kfo_ext.testing import OUTPUTS, Operands, assert_close, model_case, random_operands, run_order, truth

pytestmark = pytest.mark.gpu

SHAPES = model_case(2)
FLAT = Problems(SHAPES).flat
TASKS = 4
ROWS = {"per_task": None, "shared": (1, 1)}
# Cycles of a kernel that only waits: a few tens of milliseconds, far longer than a call takes to issue.
LONG = 50_000_000

orders = pytest.mark.parametrize("order", OUTPUTS)
rows_param = pytest.mark.parametrize("rows", ROWS)


def make_operands(device, rows="per_task", seed=0) -> Operands:
    return random_operands(SHAPES, TASKS, rows=ROWS[rows], dtype=torch.float32, device=device, seed=seed)


def check(order: str, outputs, operands: Operands) -> None:
    expected = truth(operands, SHAPES)
    for name, actual in zip(OUTPUTS[order], outputs):
        assert_close(actual, expected[name], name)


@orders
@rows_param
def test_a_captured_graph_follows_its_inputs(family, cuda, order, rows):
    operands = make_operands(cuda, rows)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_order(family, order, operands, FLAT)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run_order(family, order, operands, FLAT)
    for seed in (1, 2, 2):
        for X, changed in zip(operands, make_operands(cuda, rows, seed)):
            X.copy_(changed)
        for X in outputs:
            X.fill_(float("nan"))
        graph.replay()
        for X, eager in zip(outputs, run_order(family, order, operands, FLAT)):
            assert torch.equal(X, eager)
        check(order, outputs, operands)


def test_one_graph_of_all_orders(family, cuda):
    """Scratch memory of one order is reused by the next within the graph's pool."""
    operands = make_operands(cuda, "shared")
    for order in OUTPUTS:
        run_order(family, order, operands, FLAT)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = {order: run_order(family, order, operands, FLAT) for order in OUTPUTS}
    for _ in range(3):
        graph.replay()
    for order in OUTPUTS:
        check(order, outputs[order], operands)


@orders
@rows_param
def test_on_a_side_stream(family, cuda, order, rows):
    """The operands arrive late on the side stream, and the outputs are consumed there: another stream would see NaN."""
    source = make_operands(cuda, rows)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = Operands(*(torch.full_like(X, float("nan")) for X in source))
        torch.cuda._sleep(LONG)
        for X, value in zip(late, source):
            X.copy_(value)
        outputs = [X + 0 for X in run_order(family, order, late, FLAT)]
    side.synchronize()
    check(order, outputs, source)


@orders
def test_no_call_waits_for_the_device(family, cuda, order):
    operands = make_operands(cuda)
    run_order(family, order, operands, FLAT)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = run_order(family, order, operands, FLAT)
        # torch sees only its own synchronisations; a call that waits in any other way finds the sleep over.
        assert not torch.cuda.current_stream().query(), "the call returned after the work queued before it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(order, outputs, operands)


@orders
def test_compiled_with_reduced_overhead(family, device, order):
    """Inductor captures the operator in its own CUDA graphs, and skips none."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()

    def step(*operands):
        return tuple(2 * X for X in run_order(family, order, Operands(*operands), FLAT))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for seed in range(4):
            operands = make_operands(device, seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            outputs = [X.clone() / 2 for X in compiled(*operands)]
            check(order, outputs, operands)
    if device.type == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0


AFTER_AN_ERROR = """
import sys
import torch
from kfo_ext.testing import family_of, random_operands, run_order
from kfo_ext.problems import Problems

shapes = [(2, 3, 4)]
family = family_of(sys.argv[1], "cuda")
operands = random_operands(shapes, 2, device="cuda")
torch._assert_async(torch.zeros(1, device="cuda"))
raised = 0
for call in (torch.cuda.synchronize, lambda: run_order(family, "backward", operands, Problems(shapes).flat)):
    try:
        call()
    except RuntimeError:
        raised += 1
print("raised", raised)
"""


def test_an_earlier_asynchronous_error_is_raised(backend, cuda):
    """In a process of its own: the error leaves the process's context unusable."""
    done = subprocess.run([sys.executable, "-c", AFTER_AN_ERROR, backend], capture_output=True, text=True, timeout=120)
    assert "raised 2" in done.stdout, done.stdout + done.stderr[-2000:]
