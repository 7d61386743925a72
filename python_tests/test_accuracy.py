"""float32 is as accurate as plain torch: at most twice its error, for every output of every order.

Errors are those against float64. Most operands are positive: where sums cancel, the rounding of their terms would hide
that of the sum. The slack is a few roundings.
"""

from __future__ import annotations

import pytest
import torch

from kfo_ext.functional import batch_norm_relu, conv2d, transform
from kfo_ext.ops import library
from kfo_ext.ops.batch_norm import reference as plain_batch_norm
from kfo_ext.ops.conv2d import reference as plain_conv2d
from kfo_ext.ops.transform import reference as plain
from kfo_ext.problems import Problems
from kfo_ext.testing import relative_error

SLACK = 1e-6
CASES = {
    "linear": [(1, 5, 7)],
    "bias": [(1, 6, 1)],
    "one": [(1, 1, 1)],
    "thin": [(3, 1, 9), (3, 9, 1)],
    "conv": [(4, 3, 9), (2, 7, 8)],
    "rows": [(1, 40, 17), (1, 33, 32)],
}
TASKS = (1, 100, 2000)


def assert_as_accurate(ours: dict, eager: dict, truth: dict, where: str) -> None:
    for name, expected in truth.items():
        error, other = relative_error(ours[name], expected), relative_error(eager[name], expected)
        assert error <= 2 * other + SLACK, f"{where}, {name}: {error:.1e}, plain torch's is {other:.1e}"


def outputs(run, operands: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """run(*operands), its gradients by each operand, and theirs by each operand and dy, for fixed cotangents."""
    leaves = {name: X.to(dtype).requires_grad_() for name, X in operands.items()}
    y = run(*leaves.values())
    generator = torch.Generator().manual_seed(1)

    def positive(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator).to(dtype)

    dy = positive(y).requires_grad_()
    first = torch.autograd.grad(y, leaves.values(), dy, create_graph=True)
    inner = sum((d * positive(d)).sum() for d in first)
    second = torch.autograd.grad(inner, [*leaves.values(), dy], allow_unused=True, materialize_grads=True)
    names = ["y", *(f"d{name}" for name in leaves), *(f"second_{name}" for name in [*leaves, "dy"])]
    return {name: X.detach() for name, X in zip(names, (y, *first, *second), strict=True)}


def compare(ours, eager, operands: dict[str, torch.Tensor], where: str) -> None:
    truth = outputs(eager, operands, torch.float64)
    assert_as_accurate(outputs(ours, operands, torch.float32), outputs(eager, operands, torch.float32), truth, where)


def packed(shapes: list, tasks: int, rows: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    problems = Problems(shapes)
    rows_R, rows_L, rows_bias = rows
    sizes = {
        "R": (rows_R, problems.R.numel),
        "G": (tasks, problems.packing.numel),
        "L": (rows_L, problems.L.numel),
        "bias": (rows_bias, problems.bias.numel),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


def compare_transform(backend: str, case: str, tasks: int, rows: tuple[int, int, int]) -> None:
    problems = Problems(CASES[case])
    compare(
        lambda R, G, L, bias: transform(R, G, L, problems, bias=bias, backend=backend),
        lambda R, G, L, bias: plain.transform(R, G, L, problems.flat, bias),
        packed(CASES[case], tasks, rows),
        f"{backend}, {case}, {tasks} tasks, rows {rows}",
    )


needs_cpu = pytest.mark.skipif(not library.status()["cpu"][0], reason="no compiled CPU library")


def sharing(tasks: int) -> list[tuple[int, int, int]]:
    """Rows of R, L and bias: each shared or of each task."""
    return [(tasks, tasks, tasks), (1, 1, 1), (1, tasks, 1), (tasks, 1, 1)] if tasks > 1 else [(1, 1, 1)]


@needs_cpu
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", CASES)
def test_native_transform(case, tasks):
    for rows in sharing(tasks):
        if case != "rows" or tasks < 2000 or rows == (1, 1, 1):  # the others cost plain torch a second each
            compare_transform("native", case, tasks, rows)


@pytest.mark.parametrize("tasks", TASKS)
def test_reference_transform(tasks):
    for rows in sharing(tasks):
        compare_transform("reference", "conv", tasks, rows)


# So many that the order of a sum shows: one number after the other, and one block after the other.
@needs_cpu
@pytest.mark.parametrize("rows", [(1, 1, 1), (1, 50_000, 1)], ids=["shared", "shared R"])
def test_native_transform_of_many_tasks(rows):
    compare_transform("native", "one", 50_000, rows)


CONVOLUTIONS = {
    "few pixels": ((1, 2000, 1, 1, 8), (8, 1, 1), 1, 0),
    "images": ((2, 1000, 7, 7, 2), (4, 3, 3), 1, 1),
    "pixels": ((2, 20, 41, 28, 1), (8, 3, 3), 2, 1),
    "channels": ((2, 2, 5, 5, 200), (3, 3, 3), 1, 1),
    "many channels": ((1, 2, 4, 4, 64), (64, 3, 3), 1, 1),
    "tasks": ((2000, 1, 3, 3, 2), (2, 3, 3), 1, 1),
    "hundred tasks": ((100, 5, 7, 7, 8), (8, 3, 3), 1, 1),
    "wide stride": ((2, 100, 9, 9, 3), (4, 2, 2), 4, 1),
}


@needs_cpu
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_native_conv2d(case):
    size, (out, *kernel), stride, padding = CONVOLUTIONS[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, generator=generator)
    weight = torch.rand((size[0], out, size[-1], *kernel), generator=generator)
    compare(
        lambda x, weight: conv2d(x, weight, stride=stride, padding=padding, backend="native"),
        lambda x, weight: plain_conv2d.conv2d(x, weight, stride, padding),
        {"x": x, "weight": weight},
        case,
    )


@needs_cpu
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("tasks", "rows"), [(1, 5), (1, 20_000), (100, 50), (2000, 8)])
def test_native_batch_norm(tasks, rows, shared):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, rows, 3, generator=generator)
    weight, bias = (torch.rand(1 if shared else tasks, 3, generator=generator) + 0.5 for _ in range(2))
    # Without the ReLU: rounding moves values near zero to its other side, in torch as here, but not the same values.
    compare(
        lambda x, weight, bias: batch_norm_relu(x, weight, bias, relu=False, backend="native"),
        lambda x, weight, bias: plain_batch_norm.batch_norm_relu(x, weight, bias, 1e-5, False),
        {"x": x, "weight": weight, "bias": bias},
        f"{tasks} tasks, {rows} rows",
    )
