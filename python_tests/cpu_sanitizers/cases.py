"""Every CPU operator over the table of cases and odd shapes, against float64: what `run.py` runs under sanitizers.

    python cases.py [SEED]

Tensors are as large as their elements, so that an access beside one of them is seen.
"""

from __future__ import annotations

import itertools
import os
import random
import sys

import torch
from torch import Tensor

from kfo_ext.ops import library
from kfo_ext.ops.batch_norm import reference as plain_batch_norm
from kfo_ext.ops.conv2d import reference as plain_conv2d
from kfo_ext.problems import Problems
from kfo_ext.testing import (
    CASES,
    LARGE_CASES,
    OUTPUTS,
    STRIDES,
    TOLERANCE,
    Operands,
    assert_close,
    family_of,
    random_operands,
    relative_error,
    run_all,
    run_order,
    truth,
    with_strides,
)

OPS = torch.ops.kfo_ext
DTYPES = (torch.float32, torch.float64)
# Of LARGE_CASES, those that plain torch's float64 does not spend the time on.
LARGE = ("head_5x1600", "blocks_197x300", "short_sums")
ODD_TRANSFORMS, ODD_CONVOLUTIONS, ODD_BATCH_NORMS = 40, 50, 30


def transforms(choose: random.Random) -> int:
    """All orders of each case, with factors of each task and shared; the number of calls."""
    cases = [*CASES.values(), *(LARGE_CASES[name] for name in LARGE)]
    sides = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 65)
    cases += [
        [(choose.randint(1, 35), choose.choice(sides), choose.choice(sides)) for _ in range(2)]
        for _ in range(ODD_TRANSFORMS)
    ]
    family = family_of("native", "cpu")
    count = 0
    for i, (shapes, dtype) in enumerate(itertools.product(cases, DTYPES)):
        tasks = choose.choice((1, 2, 3, 5))
        rows = (choose.choice((1, tasks)), choose.choice((1, tasks)))
        operands = random_operands(shapes, tasks, rows=rows, dtype=dtype, seed=i)
        flat, expected = Problems(shapes).flat, truth(operands, shapes)
        for name, actual in run_all(family, operands, flat).items():
            assert_close(actual, expected[name], f"{shapes}, {tasks} tasks, {rows}, {dtype}, {name}")
        family.transform(operands.R, operands.G, operands.L, flat, operands.bias)
        # Other strides, and parts of what there is to compute.
        kind = choose.choice(STRIDES)
        partly = [with_strides(X, kind) for X in operands]
        partly = Operands(*(X if at < 4 or choose.random() < 0.7 else None for at, X in enumerate(partly)))
        for order in OUTPUTS:
            run_order(family, order, partly, flat, [choose.random() < 0.6 for _ in range(4)])
        count += 7
    return count


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    error = relative_error(actual, expected.detach())
    if not error <= 10 * TOLERANCE[actual.dtype]:
        raise AssertionError(f"{what}: relative error {error:.1e}")


def convolutions(choose: random.Random) -> int:
    """The three operators; the number of calls."""
    count = 0
    while count < 3 * ODD_CONVOLUTIONS:
        tasks, images, C, out = (choose.randint(1, most) for most in (3, 70 if count % 4 == 0 else 4, 20, 35))
        H, W, KH, KW = (choose.randint(1, most) for most in (13, 13, 4, 4))
        stride, padding = choose.choice((1, 1, 2, 3, 5, 9, 2**40)), choose.randint(0, 3)
        if H + 2 * padding < KH or W + 2 * padding < KW:
            continue
        dtype = choose.choice(DTYPES)
        x = torch.randn(tasks, images, H, W, C, dtype=dtype)
        weight = torch.randn(tasks, out, C, KH, KW, dtype=dtype)
        wide = [X.double().requires_grad_() for X in (x, weight)]
        y = plain_conv2d.conv2d(*wide, min(stride, 100), padding)
        dy = torch.randn(y.shape, dtype=dtype)
        dx, dweight = torch.autograd.grad(y, wide, dy.double())
        what = f"conv2d {tuple(x.shape)}, {tuple(weight.shape)}, stride {stride}, padding {padding}, {dtype}"
        check(OPS.conv2d(x, weight, stride, padding), y, what)
        check(OPS.conv2d_input(dy, weight, [H, W], stride, padding), dx, f"{what}, input")
        check(OPS.conv2d_weight(x, dy, [KH, KW], stride, padding), dweight, f"{what}, weight")
        count += 3
    return count


def batch_norms(choose: random.Random) -> int:
    """The three orders; the number of calls."""
    for _ in range(ODD_BATCH_NORMS):
        tasks, rows, channels = choose.randint(1, 4), choose.randint(2, 140), choose.randint(1, 70)
        dtype, relu = choose.choice(DTYPES), choose.random() < 0.5
        x, dy, ddx = (torch.randn(tasks, rows, channels, dtype=dtype) for _ in range(3))
        weight, bias = (torch.randn(choose.choice((1, tasks)), channels, dtype=dtype) for _ in range(2))
        y, mean, rstd = OPS.batch_norm_relu(x, weight, bias, 1e-5, relu)
        what = f"batch norm {tuple(x.shape)}, relu {relu}, {dtype}"
        check(y, plain_batch_norm.batch_norm_relu(*(X.double() for X in (x, weight, bias)), 1e-5, relu), what)
        need = [choose.random() < 0.7 for _ in range(3)]
        saved = (x, weight, bias, mean, rstd, dy)
        OPS.batch_norm_relu_backward(*saved, relu, need)
        cotangents = [X if choose.random() < 0.7 else None for X in (ddx, weight, bias)]
        OPS.batch_norm_relu_double_backward(*saved, *cotangents, relu, need)
    return 3 * ODD_BATCH_NORMS


def main() -> None:
    wanted = os.environ.get("KFO_CPU_ISA")
    if wanted and wanted not in library.supported_isas():
        print(f"{wanted}: not on this machine")
        return
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    choose = random.Random(seed)
    counts = [work(choose) for work in (transforms, convolutions, batch_norms)]
    print(f"{library.cpu_isa()}: {sum(counts)} calls of kernels", flush=True)


if __name__ == "__main__":
    main()
