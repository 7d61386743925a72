"""All orders of each operator on a device, for compute-sanitizer to watch; exits with 1 on a wrong number.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize_case.py

Operands come from the host and truth stays there, so that little runs on the device but the kernels themselves. Without
torch's cache every tensor is an allocation of its own, whose edges and uninitialised elements the sanitizer sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kfo_ext.functional import batch_norm_relu, conv2d
from kfo_ext.ops import triton_support
from kfo_ext.ops.batch_norm import op as batch_norm_op
from kfo_ext.ops.batch_norm import reference as batch_norm_reference
from kfo_ext.ops.conv2d import op as conv2d_op
from kfo_ext.ops.conv2d import reference as conv2d_reference
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

# The second group's factors fit in no block's shared memory.
GROUPS = {"mixed": (CASES["mixed"] + CASES["primes"], 3), "large": ([(1, 5, 260), (2, 130, 9)], 2)}
NEEDS = {
    "forward": [(True,) * 4],
    "backward": [(True, True, True, True), (True, False, True, True), (False, True, False, True)],
    "double_backward": [(True,) * 4, (True, False, True, False), (False, True, False, True)],
}
# Tasks, rows, channels: without 16-byte accesses and with them, a chunk of rows and several, groups of channels.
BATCH_NORMS = [(3, 33, 5), (2, 700, 36), (1, 70, 64)]
# Tasks, images, height, width, channels in and out, kernel, stride, padding: the networks' layers, and odd ones.
CONVOLUTIONS = [
    (2, 3, 9, 9, 1, 32, 3, 2, 1),
    (2, 3, 8, 8, 32, 32, 3, 2, 1),
    (2, 2, 7, 6, 32, 32, 3, 1, 1),
    (3, 2, 6, 7, 5, 3, 3, 1, 0),
    (1, 1, 5, 5, 8, 16, 1, 1, 0),
]
# Sums over hundreds of rows, and statistics of them.
WIDER = 20
EPS = 1e-5


def transform_lines(device: str, backend: str) -> Iterator[str]:
    """The outputs that are off, each as a line; an empty one for each case that is right."""
    family = family_of(backend, device)
    for shapes, tasks in GROUPS.values():
        flat = Problems(shapes).flat
        for rows in ((tasks, tasks), (1, 1)):
            for dtype in TOLERANCE:
                there = random_operands(shapes, tasks, rows=rows, dtype=dtype)
                expected = truth(there, shapes)
                operands = Operands(*(X.to(device) for X in there))
                for order, needs in NEEDS.items():
                    for need in needs:
                        for name, needed, X in zip(
                            OUTPUTS[order], need, run_order(family, order, operands, flat, need)
                        ):
                            error = relative_error(X.cpu(), expected[name]) if needed else float(X.numel())
                            if not error <= TOLERANCE[dtype]:
                                where = f"{backend} {dtype} rows {rows} need {need}"
                                yield f"transform {where}: {name} of {order} is off by {error:.1e}"
                yield ""


def batch_norm_lines(device: str, backend: str) -> Iterator[str]:
    """As `transform_lines`."""
    for size in BATCH_NORMS:
        tasks, _, channels = size
        for rows in (tasks, 1):
            for relu in (True, False):
                x, weight, bias = _draw([size, (rows, channels), (rows, channels)])
                weight = weight.sign() * (0.5 + weight.abs())
                # None so near the ReLU's corner that rounding decides; twice: what is moved moves the statistics.
                for _ in range(2):
                    near = batch_norm_reference.batch_norm_relu(x, weight, bias, EPS, False).abs() < 2e-3
                    x = torch.where(near, x + 0.05, x)
                ours = partial(batch_norm_relu, eps=EPS, relu=relu, backend=backend)
                right = partial(batch_norm_reference.batch_norm_relu, eps=EPS, relu=relu)
                case = f"batch_norm {size}, {rows} rows of weights, {'with' if relu else 'without'} ReLU"
                yield from _compared(case, ours, right, [x, weight, bias], device)


def conv2d_lines(device: str, backend: str) -> Iterator[str]:
    """As `transform_lines`."""
    for tasks, images, height, width, inside, outside, kernel, stride, padding in CONVOLUTIONS:
        X = _draw([(tasks, images, height, width, inside), (tasks, outside, inside, kernel, kernel)])
        ours = partial(conv2d, stride=stride, padding=padding, backend=backend)
        right = partial(conv2d_reference.conv2d, stride=stride, padding=padding, channels_last=False)
        case = f"conv2d {tuple(X[0].shape)} by {tuple(X[1].shape)}, stride {stride}, padding {padding}"
        yield from _compared(case, ours, right, X, device)


def _draw(shapes: Sequence[Sequence[int]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _compared(
    case: str,
    ours: Callable[..., Tensor],
    right: Callable[..., Tensor],
    operands: list[Tensor],
    device: str,
) -> Iterator[str]:
    """Both dtypes of a case: result, gradients and their gradients against those of `right` in float64 on the CPU."""
    for dtype, allowed in TOLERANCE.items():
        rounded = [X.to(dtype) for X in operands]
        expected = _three_orders(right, [X.double() for X in rounded])
        for (name, X), Y in zip(_three_orders(ours, [X.to(device) for X in rounded]), expected):
            error = relative_error(X.cpu(), Y[1])
            if not error <= WIDER * allowed:
                yield f"{case} {dtype}: {name} is off by {error:.1e}"
        yield ""


def _three_orders(compute: Callable[..., Tensor], operands: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The result, its gradients, and the gradients of those by operands and cotangent; with names."""
    leaves = [X.requires_grad_() for X in operands]
    y = compute(*leaves)
    dy, *dd = (X.to(y) for X in _draw([y.shape, *(X.shape for X in leaves)], seed=1))
    dy.requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    second = torch.autograd.grad(first, [*leaves, dy], dd, allow_unused=True, materialize_grads=True)
    names = ["y", *(f"gradient {i}" for i in range(len(first))), *(f"second gradient {i}" for i in range(len(second)))]
    return [(name, X.detach()) for name, X in zip(names, (y, *first, *second))]


LINES = {"transform": transform_lines, "batch_norm": batch_norm_lines, "conv2d": conv2d_lines}
OPERATORS = {"batch_norm": batch_norm_op.OPERATOR, "conv2d": conv2d_op.OPERATOR}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--operators", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument(
        "--backends", nargs="+", help="native and, for the transform on a CUDA device, triton where it is installed"
    )
    options = parser.parse_args(arguments)
    if options.backends is None:
        on_device = options.device != "cpu" and triton_support.available(torch.device(options.device))
        options.backends = ["native", "triton"] if on_device else ["native"]
    wrong = cases = 0
    for operator in options.operators:
        for backend in options.backends:
            if operator in OPERATORS:
                if backend not in OPERATORS[operator].families:
                    continue
                try:
                    OPERATORS[operator].resolve(backend, torch.device(options.device))
                except RuntimeError as error:
                    print(f"{operator}: left out: {error}", flush=True)
                    continue
            for line in LINES[operator](options.device, backend):
                wrong += bool(line)
                cases += not line
                if line:
                    # At once: a sanitizer may be out of time before the end.
                    print(line, flush=True)
    print(f"{cases} cases on {options.device} by {', '.join(options.backends)}, {wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
