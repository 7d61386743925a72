"""Bounds for any implementation on this machine, measured in the same run: multiply-adds, copies, launches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from kfo_ext.bench.device_timing import Floor, events, measure_floor
from kfo_ext.bench.timing import interleaved, samples_of
from kfo_ext.ops import library

SGEMM = 8192
SAMPLES = 7
# Steps per thread in a call: they take far longer than the call's overhead.
FMA_STEPS = 1 << 20


class Roofs(NamedTuple):
    """Rates that no kernel exceeds.

    Attributes:
        flops: float32 operations per second, None if nothing measures them.
        flops_from: what measured them.
        floor: copy bandwidth and the time of the smallest operation.
        on_cuda: which floor `seconds` uses.
    """

    flops: float | None
    flops_from: str
    floor: Floor
    on_cuda: bool

    def seconds(self, mode: str, work: float, moved: float) -> float | None:
        """Compute the minimum time of a call.

        On the CPU this is the larger of its operations at the peak and its bytes at the copy bandwidth (operands that
        stay in the cache may be faster); on CUDA the larger of its bytes and the smallest launch.

        Args:
            mode: "eager" or "graph".
            work: operations.
            moved: bytes.

        Returns:
            Seconds; None on the CPU if the peak is unknown.
        """
        if self.on_cuda:
            return self.floor.seconds(mode, moved)
        return None if self.flops is None else max(work / self.flops, moved / self.floor.bandwidth)

    def facts(self) -> dict[str, object]:
        """The bounds as JSON."""
        floor = self.floor
        return {
            "gflop_per_s": None if self.flops is None else self.flops / 1e9,
            "gflop_per_s_from": self.flops_from,
            "gb_per_s": floor.bandwidth / 1e9,
            "smallest_operation_s": floor.launch,
        }


def measure_roofs(device: torch.device, repeats: int, seconds: float) -> Roofs:
    """Measure the bounds with torch's number of threads, on the current stream."""
    floor = measure_floor(device, repeats, seconds)
    if device.type == "cuda":
        rate = sgemm_rate(device, repeats, seconds)
        return Roofs(rate, f"torch.matmul of {SGEMM} x {SGEMM} float32", floor, True)
    if not library.status()["cpu"][0]:
        return Roofs(None, "not measured: needs the compiled CPU library", floor, False)
    threads = torch.get_num_threads()
    return Roofs(fma_rate(threads), f"multiply-adds in registers, {library.cpu_isa()}, {threads} threads", floor, False)


def fma_rate(threads: int, seconds: float = 0.03) -> float:
    """Measure the peak rate of float32 multiply-adds in registers: the best of a few samples.

    Args:
        threads: the number of threads.
        seconds: length of one sample.

    Returns:
        Operations per second.
    """
    call, operations = multiply_adds(threads)
    samples, _ = samples_of({"multiply-adds": call}, SAMPLES, seconds)["multiply-adds"]
    return operations / min(samples)


def multiply_adds(threads: int) -> tuple[Callable[[], object], float]:
    """A call that only computes multiply-adds on `threads` threads, and its number of operations."""
    pool = ThreadPoolExecutor(threads)

    def call() -> float:
        return sum(pool.map(library.cpu_multiply_adds, [FMA_STEPS] * threads))

    return call, call()


def sgemm_rate(device: torch.device, repeats: int, seconds: float) -> float:
    """Float32 operations per second of a large product; TF32 stays off, as in torch's default."""
    A = torch.ones(SGEMM, SGEMM, device=device)
    out = torch.empty_like(A)
    timing = interleaved({"sgemm": lambda: torch.matmul(A, A, out=out)}, repeats, seconds, events)["sgemm"]
    return 2 * SGEMM**3 / timing.median
