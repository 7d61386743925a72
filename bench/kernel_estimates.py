"""Estimates of the transform's time on a GPU from what bounds it; nothing here is measured.

A launch takes the time of a graph's node, of the instructions before the first copy, of memory's latency, and then the
longest of three: the chain of one thread of the costliest block, what the busiest multiprocessor must issue or load
from shared memory, and the bytes that all blocks move.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, log2
from typing import NamedTuple

from kfo_ext import _plan

# Products of each order's kernel, and of how many terms: (n p, q), (n q, p), (p, p) and (q, q).
RIGHT, LEFT, SUM_R, SUM_L = range(4)
JOBS = {
    "forward": ((RIGHT, 1), (LEFT, 1)),
    "backward": ((RIGHT, 1), (SUM_R, 1), (LEFT, 1), (SUM_L, 1), (RIGHT, 1)),
    "double_backward": (
        (LEFT, 1), (LEFT, 1), (RIGHT, 1), (RIGHT, 2), (SUM_R, 1), (SUM_L, 2), (RIGHT, 2), (LEFT, 2),
    ),
}  # fmt: skip
# Instructions of a step along a tile's sum, by the tile's side: a quarter of the unrolled loop in the machine code.
STEP = {4: 135 / 4, 2: 55 / 4, 1: 27 / 4}
WARP = 32
# Of float32 where a warp computes a matrix: columns of a row, and 16-byte loads of one.
COLUMNS, VECTORS = 9, 3


class Machine(NamedTuple):
    """What the estimates assume of an H200; the clock is the vendor's, the bandwidth that of a measured copy."""

    multiprocessors: int = 132
    schedulers: int = 4  # of a multiprocessor, each of which issues an instruction a cycle
    cycles_per_us: float = 1980
    bytes_per_us: float = 4.3e6
    node_us: float = 1.5  # an empty kernel in a graph
    memory_us: float = 0.45  # latency of memory, once to read and once to write
    instruction: int = 4  # cycles from one instruction to the next that depends on it
    job_cycles: int = 120  # a barrier, and finding the operands of a product
    phase_cycles: int = 40  # until the first of a row's operands is in registers
    shuffle_cycles: int = 24
    sums_us: float = 0.8  # of the launch that adds partial sums: two reads, one after the other
    slab_bytes: int = 8700  # on their way for each block of a large problem
    slab_us: float = 0.9  # until they are there and multiplied


class Cost(NamedTuple):
    """Cycles of a block."""

    chain: float  # of a thread, with a scheduler of its own
    issue: float  # of all warps, on one scheduler
    loads: float  # from shared memory, of which a multiprocessor does one a cycle

    def throughput(self, machine: Machine) -> float:
        """Cycles that the block keeps a multiprocessor busy."""
        return max(self.issue / machine.schedulers, self.loads)


def block_cost(order: str, p: int, q: int, n: int, tiles: list[tuple[int, int]], machine: Machine) -> Cost:
    """The products of a block that holds n matrices."""
    sizes = {RIGHT: (n * p, q, q), LEFT: (n * q, p, p), SUM_R: (p, p, n * q), SUM_L: (q, q, n * p)}
    total = [0.0, 0.0, 0.0]
    for kind, terms in JOBS[order]:
        rows, columns, length = sizes[kind]
        side, share = tiles[kind]
        threads = ceil(rows / side) * ceil(columns / side) * share
        steps = terms * ceil(length / share)
        halvings = log2(share) * side * side
        warps, rounds = ceil(threads / WARP), ceil(threads / _plan.cuda_threads)
        waits = machine.job_cycles + rounds * log2(share) * machine.shuffle_cycles
        total[0] += waits + rounds * (steps * STEP[side] + halvings)
        total[1] += warps * (steps * STEP[side] + 2 * halvings)
        total[2] += warps * (steps * 2 * side + halvings)
    return Cost(*total)


def lanes_cost(order: str, p: int, q: int, n: int, machine: Machine) -> Cost:
    """A warp for each matrix: what every lane does, as the source has it."""
    times = (COLUMNS * COLUMNS, COLUMNS * VECTORS)  # a row by a factor: multiply-adds and loads
    inner = ceil(p / (WARP // q))  # rows that a group of lanes sums for dL
    # Multiply-adds, loads and stores, and phases.
    adds, loads, phases = {
        "forward": (times[0] + p * COLUMNS, times[1] + p * (VECTORS + 1) + 2 * COLUMNS, 2),
        "backward": (
            2 * times[0] + 2 * p * COLUMNS + inner * COLUMNS,
            2 * times[1] + p * (VECTORS + 3) + inner * (VECTORS + 1) + 2 * COLUMNS, 4 + p // 8,
        ),
        "double_backward": (
            5 * times[0] + 5 * p * COLUMNS + 2 * inner * COLUMNS,
            5 * times[1] + p * (3 * VECTORS + 6) + 2 * inner * (VECTORS + 1) + 6 * COLUMNS, 8 + p // 8,
        ),
    }[order]  # fmt: skip
    chain = ceil(n / machine.schedulers) * (adds + loads + phases * machine.phase_cycles)
    sums = 0.0 if order == "forward" else machine.job_cycles + p * p / _plan.cuda_threads * machine.schedulers * 4
    return Cost(chain + 2 * machine.job_cycles + sums, n * (adds + loads), n * loads)


def launch_us(order: str, flat: list[int], tasks: int, before_copies: int, moved: int, machine: Machine) -> float:
    """The time of the order's own kernel, without that of the sums."""
    blocks = [
        (
            tasks * chunks,
            lanes_cost(order, p, q, n, machine) if by_lanes else block_cost(order, p, q, n, tiles, machine),
        )
        for p, q, n, chunks, by_lanes, tiles in _plan.cuda_cuts(
            flat, tasks, list(JOBS).index(order) + 1, element_size=4
        )
    ]
    # The busiest multiprocessor has its share of the costliest blocks, rounded up, and of all others.
    costliest = max(blocks, key=lambda entry: entry[0] * entry[1].throughput(machine))
    busy = ceil(costliest[0] / machine.multiprocessors) * costliest[1].throughput(machine) + sum(
        count * cost.throughput(machine) / machine.multiprocessors for count, cost in blocks if cost is not costliest[1]
    )
    work = max(max(cost.chain for _, cost in blocks), busy) / machine.cycles_per_us
    start = before_copies * machine.instruction / machine.cycles_per_us
    return machine.node_us + start + 2 * machine.memory_us + max(work, moved / machine.bytes_per_us)


def call_us(
    order: str, flat: list[int], tasks: int, before_copies: int, moved: int, launches: Iterable[tuple[str, int, int]],
    machine: Machine,
) -> float:  # fmt: skip
    """The time of a call.

    Args:
        order: its order.
        flat: its problems.
        tasks: how many.
        before_copies: instructions of the kernel before its first copy.
        moved: bytes.
        launches: kernel, blocks and shared memory of each.
        machine: the GPU.

    Returns:
        Microseconds.
    """
    time = 0.0
    for kernel, _, _ in launches:
        if kernel == "sum_kernel":
            time += machine.node_us + machine.sums_us
        elif kernel == "tiled_kernel":
            time += machine.node_us
        else:
            time += launch_us(order, flat, tasks, before_copies, moved, machine)
    tiled = [blocks for kernel, blocks, _ in launches if kernel == "tiled_kernel"]
    if tiled:
        time += moved / min(machine.bytes_per_us, max(tiled) * machine.slab_bytes / machine.slab_us)
    return time
