"""A few calls for a profiler: one order of the transform, and the double backward of batch norm and of convolution.

ncu --profile-from-start off --set full python bench/one_call.py --worst-of runs/bench/results.json

Of the transform it is the case of `kfo bench` furthest from the floor, or one by name; of the others the first, and the
second layer of the Omniglot CNN(2).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from kfo_ext.bench import report
from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.points import GROUPS
from kfo_ext.bench.providers import kfo_packed
from kfo_ext.functional import batch_norm_relu, conv2d
from kfo_ext.ops.batch_norm import op as batch_norm_op
from kfo_ext.ops.conv2d import op as conv2d_op

# Sizes of the first layer's images, 25 of each task, as batch norm has them; of the second's, and its weights.
ROWS, CHANNELS = 25 * 14 * 14, 32
IMAGES, WEIGHTS = (25, 14, 14, 32), (32, 32, 3, 3)


def batch_norm_call(tasks: int, device: str) -> Callable[[], object]:
    """The double backward of a layer's batch norm + ReLU, by the compiled kernels."""
    x, weight, bias = (torch.randn(size, device=device) for size in ((tasks, ROWS, CHANNELS), *[(tasks, CHANNELS)] * 2))
    return _double_backward(lambda *X: batch_norm_relu(*X, backend="native"), [x, weight, bias])


def conv2d_call(tasks: int, device: str) -> Callable[[], object]:
    """The double backward of a layer's convolution, as `batch_norm_call`."""
    x, weight = (torch.randn(tasks, *size, device=device) for size in (IMAGES, WEIGHTS))
    return _double_backward(lambda *X: conv2d(*X, stride=2, padding=1, backend="native"), [x, weight])


def _double_backward(compute: Callable[..., torch.Tensor], operands: list[torch.Tensor]) -> Callable[[], object]:
    leaves = [X.requires_grad_() for X in operands]
    y = compute(*leaves)
    dy = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    dd = [torch.randn_like(X) for X in first]
    return lambda: torch.autograd.grad(first, [*leaves, dy], dd, retain_graph=True, allow_unused=True)


OTHERS = {"batch_norm": (batch_norm_call, batch_norm_op.OPERATOR), "conv2d": (conv2d_call, conv2d_op.OPERATOR)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="+", choices=OTHERS, default=[], help="beside the transform")
    parser.add_argument("--worst-of", type=Path, help="results.json of the axis tasks; absent, those below decide")
    parser.add_argument("--group", choices=GROUPS, default="CNN(4)")
    parser.add_argument("--order", choices=ORDERS, default="double_backward")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    group, order, tasks = options.group, options.order, options.tasks
    result = report.read(options.worst_of) if options.worst_of and options.worst_of.exists() else None
    if result and (row := report.worst([row for row in result["rows"] if row["axis"] == "tasks"])):
        group, order, tasks = row["group"], row["order"], row["tasks"]
    calls = [kfo_packed(random_case(GROUPS[group], tasks, torch.float32, options.device))[order]]
    print(f"{group}, {tasks} tasks, {order}")
    for name in options.operators:
        make, operator = OTHERS[name]
        if options.device in operator.devices:
            calls.append(make(tasks, options.device))
            print(f"{name}, {tasks} tasks, double_backward")
    for call in calls:
        call()
    if options.device == "cpu":
        return 0
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        for call in calls:
            for _ in range(options.calls):
                call()
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
