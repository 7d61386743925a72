"""All orders of a small group on a device, to run under compute-sanitizer; exits with 1 on a wrong number.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize_case.py

Operands and truth are computed on the host, so that the device runs little besides the kernels. Without torch's cache
every tensor is a separate allocation, whose bounds and uninitialised elements the sanitizer checks.
"""

from __future__ import annotations

import argparse

import torch

from kfo_ext.ops import triton_support
from kfo_ext.problems import Problems
from kfo_ext.testing import (
    CASES,
    OUTPUTS,
    TOLERANCE,
    Operands,
    family_of,
    random_operands,
    relative_error,
    run_order,
    truth,
)

# The second group's factors exceed a block's shared memory.
GROUPS = {"mixed": (CASES["mixed"] + CASES["primes"], 3), "large": ([(1, 5, 260), (2, 130, 9)], 2)}
NEEDS = {
    "forward": [(True,) * 4],
    "backward": [(True, True, True, True), (True, False, True, True), (False, True, False, True)],
    "double_backward": [(True,) * 4, (True, False, True, False), (False, True, False, True)],
}


def wrong(backend: str, device: str, dtype: torch.dtype, shapes, tasks: int, rows) -> list[str]:
    """One line for each wrong output of a case."""
    family, flat = family_of(backend, device), Problems(shapes).flat
    there = random_operands(shapes, tasks, rows=rows, dtype=dtype)
    expected = truth(there, shapes)
    operands = Operands(*(X.to(device) for X in there))
    lines = []
    for order, needs in NEEDS.items():
        for need in needs:
            for name, needed, X in zip(OUTPUTS[order], need, run_order(family, order, operands, flat, need)):
                error = relative_error(X.cpu(), expected[name]) if needed else float(X.numel())
                if not error <= TOLERANCE[dtype]:
                    lines.append(f"{backend} {dtype} rows {rows} need {need}: {name} of {order} is off by {error:.1e}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", help="native and, on a CUDA device, triton where it is installed")
    options = parser.parse_args(arguments)
    if options.backends is None:
        on_device = options.device != "cpu" and triton_support.available(torch.device(options.device))
        options.backends = ["native", "triton"] if on_device else ["native"]
    lines, cases = [], 0
    for backend in options.backends:
        for shapes, tasks in GROUPS.values():
            for rows in ((tasks, tasks), (1, 1)):
                for dtype in TOLERANCE:
                    lines += wrong(backend, options.device, dtype, shapes, tasks, rows)
                    cases += 1
    print(
        "\n".join([*lines, f"{cases} cases on {options.device} by {', '.join(options.backends)}, {len(lines)} wrong"])
    )
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
