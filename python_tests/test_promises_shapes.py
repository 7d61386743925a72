"""Promises about shapes: fuzzed ones of the layers, and offsets that need more than 32 bits."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from kfo_ext.functional import batch_norm_relu, conv2d
from kfo_ext.testing import relative_error

ROOT = Path(__file__).resolve().parent.parent
CASES = 60


def numbers(draw: torch.Generator, *limits: tuple[int, int]) -> list[int]:
    return [int(torch.randint(low, high + 1, (), generator=draw)) for low, high in limits]


def leaves(draw: torch.Generator, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Every second one in memory laid out backwards."""
    out = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    reverse = [X.permute(*range(X.dim())[::-1]).contiguous().permute(*range(X.dim())[::-1]) for X in out]
    return [(a if i % 2 else b).requires_grad_() for i, (a, b) in enumerate(zip(out, reverse))]


def two_orders(Y: torch.Tensor, operands: list[torch.Tensor], cotangents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Y, its gradients, and theirs against cotangents."""
    first = torch.autograd.grad(Y, operands, cotangents[0], create_graph=True)
    inner = sum((a * b).sum() for a, b in zip(first, cotangents[1:]))
    return [Y, *first, *torch.autograd.grad(inner, operands, allow_unused=True, materialize_grads=True)]


def compare(ours: torch.Tensor, plain: torch.Tensor, operands: list[torch.Tensor], draw: torch.Generator, what) -> None:
    cotangents = [torch.randn(X.shape, generator=draw, dtype=torch.float64) for X in (ours, *operands)]
    for i, (a, b) in enumerate(zip(*(two_orders(Y, operands, cotangents) for Y in (ours, plain)), strict=True)):
        assert a.shape == b.shape, (what, i)
        assert relative_error(a.detach(), b.detach()) < 1e-10 or (a - b).abs().max() < 1e-12, (what, i)


def test_fuzzed_convolutions():
    draw = torch.Generator().manual_seed(0)
    for _ in range(CASES):
        tasks, images, channels, out = numbers(draw, (1, 3), (1, 3), (1, 19), (1, 35))
        height, width, kernel, other, stride, padding = numbers(draw, (1, 13), (1, 13), (1, 5), (1, 5), (1, 3), (0, 2))
        if height + 2 * padding < kernel or width + 2 * padding < other or padding >= min(kernel, other):
            continue
        x, w = leaves(draw, (tasks, images, height, width, channels), (tasks, out, channels, kernel, other))
        plain = torch.stack([
            torch.nn.functional.conv2d(a.movedim(-1, 1), b, stride=stride, padding=padding).movedim(1, -1)
            for a, b in zip(x, w)
        ])  # fmt: skip
        ours = conv2d(x, w, stride=stride, padding=padding)
        compare(ours, plain, [x, w], draw, (tuple(x.shape), tuple(w.shape), stride, padding))


@pytest.mark.parametrize("poisoned", range(5))
def test_not_a_number_stays_in_its_task_in_every_order_of_a_convolution(poisoned):
    draw = torch.Generator().manual_seed(2)
    x, w = leaves(draw, (3, 2, 6, 5, 7), (3, 9, 7, 3, 3))
    cotangents = [torch.randn(X.shape, generator=draw, dtype=torch.float64) for X in (conv2d(x, w), x, w)]
    clean = two_orders(conv2d(x, w), [x, w], cotangents)
    operands = [X.detach().clone() for X in (x, w, *cotangents)]
    operands[poisoned][1, 0, 0, 0, 0] = float("nan")
    x, w = (X.requires_grad_() for X in operands[:2])
    dirty = two_orders(conv2d(x, w), [x, w], operands[2:])
    assert any(X[1].isnan().any() for X in dirty)
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no_relu"])
def test_fuzzed_batch_norms(relu):
    draw = torch.Generator().manual_seed(1)
    for _ in range(CASES):
        tasks, rows, channels, shared = numbers(draw, (1, 4), (2, 140), (1, 40), (0, 1))
        own = 1 if shared else tasks
        x, w, b = leaves(draw, (tasks, rows, channels), (own, channels), (own, channels))
        normal = (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        plain = normal * w[:, None] + b[:, None]
        plain = plain.relu() if relu else plain
        compare(batch_norm_relu(x, w, b, relu=relu), plain, [x, w, b], draw, (tuple(x.shape), shared))


def test_the_plan_counts_beyond_32_bits():
    plan = pytest.importorskip("kfo_ext._plan", reason="the extension is not built")
    first, second = (2**8, 4096, 4096), (3, 50_000, 2)
    after = plan.problems([*first, *second, 1, 2, 50_000])[2]
    assert after["G"] == 2**32 + 3 * 50_000 * 2
    assert after["R"] == 4096**2 + 50_000**2
    assert plan.sizes([*first, *second, 1, 2, 50_000]) == (
        4096**2 + 50_000**2 + 4, 2**32 + 400_000, 4096**2 + 4 + 50_000**2, 4096**2 + 200_000,
    )  # fmt: skip
    for order in (1, 2, 3):
        chunks = plan.chunks(list(first), 2, order)
        covered = sorted((task * 2**8 + begin, task * 2**8 + end) for _, task, begin, end in chunks)
        assert covered[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
        assert covered[-1][1] == 2 * 2**8


def test_indices_of_kernels_are_64_bits_before_they_are_multiplied():
    """As written: the number of a program or block, and what is added to an offset, is widened where it is read."""
    triton = (ROOT / "kfo_ext" / "ops" / "transform" / "triton" / "kernels.py").read_text()
    found = re.findall(r"(?:tl\.program_id\(0\)|\+ tl\.arange\(.*?\))(\S*)", triton)
    assert len(found) > 5
    assert set(found) == {".to(tl.int64)"}
    multiplied = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        multiplied += re.findall(r".*(?:blockIdx\.\w\)? \*|\* (?:static_cast<\w+>\()?blockIdx).*", path.read_text())
    assert multiplied
    assert all("static_cast<int64_t>(blockIdx" in line for line in multiplied), multiplied
