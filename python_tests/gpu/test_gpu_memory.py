"""Memory: what a call allocates and keeps, what happens when there is too little, and more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from kfo_ext.problems import Problems
from kfo_ext.testing import LARGE_CASES, OUTPUTS, Operands, assert_close, model_case, random_operands, run_order, truth

pytestmark = pytest.mark.gpu

GROUPS = {"CNN(4)": model_case(4), "head_5x1600": LARGE_CASES["head_5x1600"], "conv_64": LARGE_CASES["conv_64"]}
TASKS = 4
# Beside the outputs. Triton's, of one large problem: partial dR and dL, and four intermediates of a double backward.
SCRATCH = {"native": 1, "triton": 6}
# torch's allocator rounds every block up to a multiple of this.
BLOCK = 512

orders = pytest.mark.parametrize("order", OUTPUTS)


def rounded(X: torch.Tensor) -> int:
    return -(-X.nbytes // BLOCK) * BLOCK


@orders
@pytest.mark.parametrize("group", GROUPS)
def test_a_call_allocates_its_outputs_and_scratch(backend, family, cuda, group, order):
    shapes, flat = GROUPS[group], Problems(GROUPS[group]).flat
    operands = random_operands(shapes, TASKS, dtype=torch.float32, device=cuda)
    run_order(family, order, operands, flat)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    outputs = run_order(family, order, operands, flat)
    after = torch.cuda.memory_stats()

    allocations = after["allocation.all.allocated"] - before["allocation.all.allocated"]
    assert allocations <= len(outputs) + SCRATCH[backend]
    kept = after["allocated_bytes.all.current"] - before["allocated_bytes.all.current"]
    # A block of the allocator may stay undivided when less than a megabyte of it is left over.
    assert sum(map(rounded, outputs)) <= kept <= sum(X.nbytes for X in outputs) + len(outputs) * 2**20
    scratch = after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"] - kept
    assert scratch <= sum(X.nbytes for X in (*operands, *outputs)) + 2**20, "scratch in proportion to the operands"


def test_repeated_calls_keep_nothing(family, cuda):
    shapes, flat = GROUPS["CNN(4)"], Problems(GROUPS["CNN(4)"]).flat
    operands = random_operands(shapes, TASKS, dtype=torch.float32, device=cuda)
    kept = []
    for _ in range(5):
        for order in OUTPUTS:
            run_order(family, order, operands, flat)
        kept.append(torch.cuda.memory_allocated())
    assert len(set(kept)) == 1


def test_too_little_memory_is_torchs_error(family, cuda):
    """Half a TiB of output from operands of a few MiB; the next call works."""
    shapes, tasks = [(1, 1024, 1024)], 2**17
    R, G, L = (torch.ones(1, 1024 * 1024, device=cuda) for _ in range(3))
    with pytest.raises(torch.OutOfMemoryError):
        family.transform(R, G.expand(tasks, -1), L, Problems(shapes).flat)
    assert_close(family.transform(R, G, L, Problems(shapes).flat), torch.full_like(G, 2.0**20).double(), "Y")


def past(limit: int) -> dict[str, tuple[tuple[int, int, int], int]]:
    """Problem and tasks of more than `limit` elements: in many rows of 64 x 64 x 9, or in one row."""
    return {
        "many_tasks": ((64, 64, 9), limit // (64 * 64 * 9) + 40),
        "one_long_row": ((limit // (64 * 9) + 40, 64, 9), 1),
    }


@orders
@pytest.mark.parametrize("case", past(0))
def test_more_elements_than_32_bits_count(family, device, case, order):
    """Shared factors; G, dY and ddG are zero but at their two ends, so that a few matrices decide every output.

    On the CPU the same with fewer elements.
    """
    shape, tasks = past(2**31 if device.type == "cuda" else 2**16)[case]
    B, p, q = shape
    if device.type == "cuda":
        # 4 bytes an element: five operands and outputs like G at most, scratch for four intermediates, and room.
        needed = 12 * 4 * B * p * q * tasks
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of free device memory")
    # What decides: the first and the last 8 matrices of all tasks together, as a small case of its own.
    ends, numel = 8, p * q
    small = random_operands([(1, p, q)], 2 * ends, rows=(1, 1), dtype=torch.float32, device=device)

    def spread(X: torch.Tensor) -> torch.Tensor:
        """(2 * ends, p * q) -> (tasks, B * p * q), zero between."""
        out = X.new_zeros(tasks * B * p * q)
        out[: ends * numel] = X[:ends].flatten()
        out[-ends * numel :] = X[ends:].flatten()
        return out.view(tasks, -1)

    large = Operands(
        small.R, spread(small.G), small.L, spread(small.dY), small.ddR, spread(small.ddG), small.ddL, small.bias
    )
    expected = truth(small, [(1, p, q)])
    for name, actual in zip(OUTPUTS[order], run_order(family, order, large, Problems([shape]).flat)):
        if actual.shape != expected[name].shape:
            flat = actual.view(-1)
            assert not flat[ends * numel : -ends * numel].any(), f"{name} between the ends"
            actual = torch.cat([flat[: ends * numel], flat[-ends * numel :]]).view(2 * ends, numel)
        assert_close(actual, expected[name], name)
        del actual
    if device.type == "cuda":
        torch.cuda.empty_cache()
