"""A table of every compiled kernel's resources per architecture: registers, shared memory, spills; without a GPU.

    python bench/kernel_resources.py --out bench/results/kernel_resources.json

writes the JSON file and a Markdown table beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import cuda_resources, kernel_estimates, triton_resources
from kfo_ext import _plan
from kfo_ext.bench.result import facts_of, provenance, write_result
from kfo_ext.problems import Problems
from kfo_ext.testing import model_case

TASKS = 16
GROUPS = {"omniglot_cnn2": model_case(2), "omniglot_cnn4": model_case(4), "head_5x1600": [(1, 5, 1600)]}
ORDERS = ("forward", "backward", "double_backward")
# Images, height, width, in and out channels, kernel height and width, stride, padding of a task's convolution.
CONVOLUTIONS = {
    "omniglot, first layer": (25, 28, 28, 1, 32, 3, 3, 2, 1),
    "omniglot, second layer": (25, 14, 14, 32, 32, 3, 3, 2, 1),
    "cifar_fs, first layer": (25, 32, 32, 3, 32, 3, 3, 1, 1),
    "cifar_fs, second layer": (25, 32, 32, 32, 32, 3, 3, 1, 1),
}
OPERATORS = ("conv2d", "conv2d_input", "conv2d_weight")


class Gpu(NamedTuple):
    """A GPU as the estimates assume it: the vendor's numbers for an H200, except for the last two."""

    name: str = "H200"
    arch: str = "sm_90"
    multiprocessors: int = 132
    registers: int = 65536  # of a multiprocessor
    shared_bytes: int = 228 * 1024  # of a multiprocessor; each block takes 1 KiB more than it requests
    bytes_per_us: float = 4.8e6
    flops_per_us: float = 67e6  # float32, no tensor cores
    empty_launch_us: float = 2.0  # in a graph
    share_of_flops: float = 0.4  # 4 x 4 tiles: 8 reads of shared memory for 16 multiply-adds, at most half of the peak
    share_of_convolutions: float = 0.5  # 8 x 4 tiles: 12 reads of 16 bytes for 128 multiply-adds

    def resident(self, registers: int, shared_bytes: int) -> int:
        """Blocks of a kernel on one multiprocessor at once."""
        by_registers = self.registers // (registers * _plan.cuda_threads)
        return min(by_registers, self.shared_bytes // (shared_bytes + 1024), 2048 // _plan.cuda_threads)


def estimates(registers: dict[str, int], before_copies: dict[str, int], gpu: Gpu) -> list[dict[str, object]]:
    """Estimate work, launches, residency and time; nothing here is measured.

    Args:
        registers: registers per thread, by kernel.
        before_copies: instructions before the first copy, by kernel.
        gpu: the GPU.

    Returns:
        One row per group and order.
    """
    out = []
    for name, shapes in GROUPS.items():
        flat = Problems(shapes).flat
        for number, order in enumerate(ORDERS, 1):
            launches = _plan.cuda_launches(flat, TASKS, number, element_size=4)
            moved = _plan.bytes(flat, TASKS, number, factor_rows=TASKS, element_size=4)
            flops = _plan.flops(flat, TASKS, number)
            work = max(moved / gpu.bytes_per_us, flops / (gpu.share_of_flops * gpu.flops_per_us))
            out.append(
                {
                    "group": name,
                    "order": order,
                    **_launched(launches, registers, gpu, moved, flops),
                    "bytes_us": round(moved / gpu.bytes_per_us, 2),
                    "flops_us": round(flops / gpu.flops_per_us, 2),
                    "bytes_or_flops_us": round(gpu.empty_launch_us * len(launches) + work, 1),
                    "estimate_us": round(
                        kernel_estimates.call_us(
                            order,
                            flat,
                            TASKS,
                            before_copies[f"{order}_kernel"],
                            moved,
                            launches,
                            kernel_estimates.Machine(),
                        ),
                        1,
                    ),
                }
            )
    return out


def convolution_estimates(registers: dict[str, int], gpu: Gpu) -> list[dict[str, object]]:
    """The same for the convolutions of two networks, of which the images of the first layer get no gradient."""
    out = []
    for name, sizes in CONVOLUTIONS.items():
        images, height, width, channels, out_channels, *kernel, stride, padding = sizes
        rows, columns = ((n + 2 * padding - k) // stride + 1 for n, k in zip((height, width), kernel))
        taps = kernel[0] * kernel[1]
        flops = 2 * TASKS * images * rows * columns * out_channels * channels * taps
        elements = images * (height * width * channels + rows * columns * out_channels) + channels * out_channels * taps
        for operator, launches in zip(OPERATORS, _plan.cuda_conv2d_launches(sizes, TASKS, element_size=4)):
            if operator == "conv2d_input" and "first" in name:
                continue
            moved = 4 * TASKS * elements
            work = max(moved / gpu.bytes_per_us, flops / (gpu.share_of_convolutions * gpu.flops_per_us))
            out.append(
                {
                    "layer": name,
                    "operator": operator,
                    **_launched(launches, registers, gpu, moved, flops),
                    "estimate_us": round(gpu.empty_launch_us * len(launches) + work, 1),
                }
            )
    return out


def _launched(
    launches: Sequence[tuple[str, int, int]], registers: dict[str, int], gpu: Gpu, moved: int, flops: int
) -> dict[str, object]:
    """The facts of a call: its first launch, and how much it moves and computes."""
    kernel, blocks, shared_bytes = launches[0]
    resident = gpu.resident(registers[kernel], shared_bytes)
    return {
        "launches": len(launches),
        "blocks": blocks,
        "shared_bytes": shared_bytes,
        "resident_blocks": resident,
        "waves": round(blocks / (gpu.multiprocessors * resident), 2),
        "MB": round(moved / 1e6, 2),
        "MFLOP": round(flops / 1e6, 1),
    }


def markdown(result: dict) -> str:
    """The result as tables."""

    def table(rows: list[dict]) -> str:
        names = list(rows[0])
        lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    return "\n\n".join(
        [
            "# What the kernels need",
            f"Made by `python bench/kernel_resources.py` from {provenance(result)}; nvcc {result['nvcc']}.",
            "## CUDA library\n\nRead from its machine code. Shared memory is dynamic: see the estimates.",
            table(result["cuda"]),
            f"## Estimates for an {result['gpu']['name']}\n\n"
            f"float32, {TASKS} tasks, a factor per task, every output wanted. **Not measured**: what a first run "
            "will be held against, perhaps 40 % off. Blocks, shared memory, residency and waves are of the first "
            f"launch. `bytes_or_flops_us` is an older estimate: {result['gpu']['empty_launch_us']} us a launch and the "
            f"larger of bytes at {result['gpu']['bytes_per_us'] / 1e6} TB/s and FLOPs at "
            f"{result['gpu']['share_of_flops']:.0%} of {result['gpu']['flops_per_us'] / 1e6:.0f} TFLOP/s. "
            "`estimate_us` has what that leaves out (`bench/kernel_estimates.py`): "
            f"{result['machine']['node_us']} us a launch, the instructions before the first copy, memory's latency, "
            "and the longest of a thread's chain of instructions, what the busiest multiprocessor issues or loads "
            f"from shared memory, and bytes at {result['machine']['bytes_per_us'] / 1e6} TB/s.",
            table(result["estimates"]),
            "The convolutions of a network's layers, by the same rules, but with FLOPs at "
            f"{result['gpu']['share_of_convolutions']:.0%} of the peak. **Not measured** either.",
            table(result["convolution_estimates"]),
            "## Triton\n\nCompiled ahead of time.",
            table(result["triton"]),
        ]
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    cuda = cuda_resources.rows()
    gpu = Gpu()
    of_gpu = [row for row in cuda if (row.dtype, row.arch) == ("float32", gpu.arch)]
    registers = {row.kernel: row.registers for row in of_gpu}
    before_copies = {row.kernel: row.before_copies for row in of_gpu}
    result = {
        **facts_of(options),
        "nvcc": _plan.build_info()["nvcc"],
        "gpu": gpu._asdict(),
        "cuda": [row._asdict() for row in cuda],
        "machine": kernel_estimates.Machine()._asdict(),
        "estimates": estimates(registers, before_copies, gpu),
        "convolution_estimates": convolution_estimates(registers, gpu),
        "triton": [row._asdict() for row in triton_resources.rows()],
    }
    write_result(options.out, result, lambda result: markdown(result) + "\n")
    spilling = [row for kind in ("cuda", "triton") for row in result[kind] if cuda_resources.spills(row)]
    print(f"{len(result['cuda'])} CUDA and {len(result['triton'])} Triton kernels, {len(spilling)} with spills")


if __name__ == "__main__":
    main()
