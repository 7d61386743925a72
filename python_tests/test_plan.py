"""kfo_ext._plan: the host-side plan against the same laws stated in Python."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest

plan = pytest.importorskip("kfo_ext._plan", reason="the extension is not built")

GROUPS = {
    "one": [(3, 5, 7)],
    "bias": [(1, 32, 1), (1, 1, 1)],
    "convolutions": [(32, 1, 9), (1, 32, 1), (32, 32, 9), (100, 7, 25), (1, 5, 32)],
    "large": [(1, 5, 1600), (3, 784, 784), (200, 64, 9)],
    "empty": [],
}
ORDERS = [1, 2, 3]


def flat(shapes: list[tuple[int, int, int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


@pytest.mark.parametrize("name", GROUPS)
def test_problems_follow_each_other_in_every_packed_row(name):
    R = G = L = bias = 0
    expected = []
    for B, p, q in GROUPS[name]:
        expected.append({"B": B, "p": p, "q": q, "R": R, "G": G, "L": L, "bias": bias})
        R, G, L, bias = R + p * p, G + B * p * q, L + q * q, bias + p * q
    assert plan.problems(flat(GROUPS[name])) == expected
    assert plan.sizes(flat(GROUPS[name])) == (R, G, L, bias)


@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tasks", [0, 1, 3, 16])
@pytest.mark.parametrize("name", GROUPS)
def test_chunks_cover_every_matrix_once(name, tasks, order, shared):
    seen = Counter()
    for problem, task, begin, end in plan.chunks(flat(GROUPS[name]), tasks, order, *shared):
        assert begin < end
        B = GROUPS[name][problem][0]
        seen.update((problem, task + row // B, row % B) for row in range(begin, end))
    expected = {(i, task, b) for i, (B, _, _) in enumerate(GROUPS[name]) for task in range(tasks) for b in range(B)}
    assert set(seen) == expected
    assert not seen or max(seen.values()) == 1


def test_many_small_matrices_are_cut_into_several_chunks():
    assert len(plan.chunks([512, 32, 9], 1, 1)) > 4
    assert len(plan.chunks([32, 32, 9], 16, 1, True, True)) > 4


def test_large_partial_gradients_are_not_multiplied():
    # 16 tasks share a factor of 1600 x 1600: a partial sum each would be 164 MB.
    assert len(plan.chunks([1, 5, 1600], 16, 2, True, True)) <= 4


@pytest.mark.parametrize("name", GROUPS)
def test_costs(name):
    tasks = 3
    left = sum(2 * B * p * p * q for B, p, q in GROUPS[name]) * tasks
    right = sum(2 * B * p * q * q for B, p, q in GROUPS[name]) * tasks
    shapes = flat(GROUPS[name])
    assert [plan.flops(shapes, tasks, order) for order in ORDERS] == [
        left + right,
        2 * left + 3 * right,
        5 * left + 7 * right,
    ]
    R, G, L, _ = plan.sizes(shapes)
    assert plan.bytes(shapes, tasks, 1, 1, 4) == 4 * (2 * tasks * G + R + L)
    assert plan.bytes(shapes, tasks, 2, tasks, 8) == 8 * tasks * (3 * G + 2 * (R + L))


def test_chunks_are_the_same_in_every_call():
    rng = random.Random(0)
    for _ in range(20):
        shapes = [rng.randint(1, 70) for _ in range(3 * rng.randint(1, 4))]
        arguments = (shapes, rng.randint(0, 5), rng.choice(ORDERS))
        assert plan.chunks(*arguments) == plan.chunks(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan.sizes([2, 3]), r"shapes: expected \(B, p, q\) triples, got 2 integers"),
        (lambda: plan.sizes([2, 0, 4]), r"shapes: B, p and q must be at least 1, got \[\(2, 0, 4\)\]"),
        (lambda: plan.sizes([2, -3, 4]), "at least 1"),
        (lambda: plan.sizes([1, 2**40, 1]), "too large"),
        (lambda: plan.sizes([1, 2**31, 1] * 3), "too large"),
        (lambda: plan.flops([1, 2, 3], 1, 4), "order: expected 1, 2 or 3, got 4"),
        (lambda: plan.chunks([1, 2, 3], -1, 1), "tasks: expected at least 0, got -1"),
    ],
    ids=["pairs", "zero", "negative", "product", "sum", "order", "tasks"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_build_info():
    info = plan.build_info()
    assert info["id"] == plan.build_id()
    assert info["instruction_sets"] == ["avx512", "avx2", "baseline"]
    assert (info["nvcc"] is None) == (info["architectures"] == [])
    project = Path(__file__).parent.parent / "pyproject.toml"
    assert f'version = "{info["version"]}"' in project.read_text().splitlines()


def test_flops_stay_finite_where_integers_would_not():
    assert math.isfinite(plan.flops([1000, 10000, 10000], 1000, 3))
