"""Promises about threads and processes: the same bits at any number of threads, any first caller, forks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from deadlines import seconds
from meta_steps import make_batch, make_learner

from kfo_ext.functional import batch_norm_relu, conv2d, transform
from kfo_ext.ops.transform.op import NATIVE
from kfo_ext.problems import Problems
from kfo_ext.testing import model_case, random_operands

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the compiled CPU library is not built")

THREADS, REPEATS = range(1, 14), 52


def random_leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def of_the_network(rows: tuple[int, int]) -> tuple:
    shapes = model_case(2)
    R, G, L, *_ = random_operands(shapes, 3, rows=rows, dtype=torch.float32)
    problems = Problems(shapes)
    return (lambda R, G, L: transform(R, G, L, problems)), [X.requires_grad_() for X in (R, G, L)]


PROGRAMS = {
    "transform": lambda: of_the_network((3, 3)),
    "transform_shared": lambda: of_the_network((1, 1)),
    "conv2d": lambda: ((lambda x, w: conv2d(x, w, padding=1)), random_leaves((3, 7, 9, 9, 5), (3, 17, 5, 3, 3))),
    "batch_norm_relu": lambda: (batch_norm_relu, random_leaves((3, 300, 19), (1, 19), (1, 19))),
}


def two_orders(function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, the gradients, and the gradients of their squares."""
    Y = function(*leaves)
    first = torch.autograd.grad((Y * Y.detach().cos()).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(X.square().sum() for X in first), leaves, allow_unused=True)
    return [Y.detach(), *(X.detach() for X in first), *(X for X in second if X is not None)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_bits_at_thirteen_thread_counts(program):
    function, leaves = PROGRAMS[program]()
    expected = two_orders(function, leaves)
    assert len(expected) > len(leaves) + 1, "second derivatives must be among them"
    for repeat in range(REPEATS):
        torch.set_num_threads(THREADS[repeat % len(THREADS)])
        for actual, right in zip(two_orders(function, leaves), expected, strict=True):
            assert torch.equal(actual, right), f"repeat {repeat}, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("kind", ["maml-psd", "anil"])
def test_the_same_meta_gradients_at_thirteen_thread_counts(kind):
    learner, batch = make_learner(kind, torch.float32), make_batch(0, torch.float32)

    def gradients() -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(learner(batch).loss, list(learner.parameters()), allow_unused=True)

    expected = gradients()
    for repeat in range(REPEATS):
        torch.set_num_threads(THREADS[repeat % len(THREADS)])
        for actual, right in zip(gradients(), expected, strict=True):
            assert actual is right is None or torch.equal(actual, right), f"{torch.get_num_threads()} threads"


# The very first calls of a process: whatever is made once is made while eight threads ask for it.
FIRST_CALLS = """
import os, threading
import torch
from kfo_ext import KFO, MAML, Problems, transform
from kfo_ext.functional import batch_norm_relu, conv2d

torch.set_num_threads(1)

def work(seed, backend):
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    problems = Problems([(seed + 1, seed + 2, 5), (1, 3, seed + 4)])
    R, G, L = (random(2, packing.numel) for packing in (problems.R, problems.packing, problems.L))
    x, w, b = random(2, 3, 6 + seed, 6, 2), random(2, 3 + seed, 2, 3, 3), random(2, 2)
    y = conv2d(x, w, backend=backend)
    z = batch_norm_relu(x.flatten(1, 3), b, b.cos(), backend=backend)
    loss = transform(R, G, L, problems, backend=backend).square().sum() + y.square().sum() + z.square().sum()
    first = torch.autograd.grad(loss, [R, G, L, x, w, b], create_graph=True)
    second = torch.autograd.grad(sum(X.square().sum() for X in first), [R, G, L, x, w, b])
    return [X.detach() for X in (*first, *second)]

def together():
    barrier, results = threading.Barrier(8), [None] * 8
    def call(seed):
        barrier.wait()
        results[seed] = work(seed, "native")
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in enumerate(results):
        for a, b in zip(result, work(seed, "reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return True

if not os.fork():
    os._exit(0 if together() else 1)
assert os.wait()[1] == 0, "the child of a fork after the import failed"
assert together()
if not os.fork():
    os._exit(0 if together() else 1)
assert os.wait()[1] == 0, "the child of a fork after the first calls failed"
assert not torch.cuda.is_initialized()
"""


def test_first_calls_of_eight_threads_and_of_forked_children():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FIRST_CALLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(120))
    assert done.returncode == 0, done.stderr
