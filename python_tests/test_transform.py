"""The operators against float64 autograd of the plain reference: every order, output, dtype, row count and stride."""

from __future__ import annotations

import itertools

import pytest
import torch

from kfo_ext import testing
from kfo_ext.ops import library
from kfo_ext.ops.transform import reference
from kfo_ext.ops.transform.op import NATIVE
from kfo_ext.problems import Problems
from kfo_ext.testing import (
    CASES,
    LARGE_CASES,
    STRIDES,
    Operands,
    assert_close,
    model_case,
    random_operands,
    truth,
    with_strides,
)

NEED_ALL = [True, True, True]
ROWS = {"per_task": None, "shared": (1, 1), "shared_R": (1, 3), "shared_L": (3, 1)}

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the compiled CPU library is not built")


def run_all(operands: Operands, flat: list[int]) -> dict[str, torch.Tensor]:
    return testing.run_all(NATIVE, operands, flat)


def check_all(operands: Operands, shapes) -> None:
    expected = truth(operands, shapes)
    for name, actual in run_all(operands, Problems(shapes).flat).items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_order_equals_truth(case, rows, dtype):
    check_all(random_operands(CASES[case], 3, rows=ROWS[rows], dtype=dtype), CASES[case])


@pytest.mark.parametrize("layers", [2, 4])
def test_paper_networks(layers):
    shapes = model_case(layers)
    check_all(random_operands(shapes, 4, dtype=torch.float32), shapes)


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()


@pytest.mark.parametrize("rows", [(1, 1), (3, 3), (1, 3)], ids=str)
@pytest.mark.parametrize("case", LARGE_CASES)
def test_large_factors(case, rows):
    shapes = LARGE_CASES[case]
    check_all(random_operands(shapes, 3, rows=rows, dtype=torch.float32), shapes)
    check_all(random_operands(shapes, 1, dtype=torch.float64), shapes)


def test_fuzzed_shapes():
    draw = torch.Generator().manual_seed(1)
    for seed in range(60):
        count = int(torch.randint(1, 4, (), generator=draw))
        sizes = torch.randint(1, 41, (count, 3), generator=draw).tolist()
        tasks = int(torch.randint(1, 4, (), generator=draw))
        rows = [(tasks, tasks), (1, 1), (tasks, 1), (1, tasks)][seed % 4]
        check_all(
            random_operands([tuple(size) for size in sizes], tasks, rows=rows, seed=seed), [tuple(s) for s in sizes]
        )


def test_integer_operands_are_exact():
    shapes = CASES["mixed"] + CASES["lane_edges"]
    operands = Operands(*(torch.randint(-3, 4, X.shape).float() for X in random_operands(shapes, 2)))
    expected = truth(operands, shapes)
    for name, actual in run_all(operands, Problems(shapes).flat).items():
        assert torch.equal(actual.double(), expected[name]), name


def test_forward_adds_the_bias():
    shapes = CASES["mixed"]
    flat = Problems(shapes).flat
    for rows in ((3, 3), (1, 1)):
        operands = random_operands(shapes, 3, rows=rows)
        actual = NATIVE.transform(operands.R, operands.G, operands.L, flat, operands.bias)
        assert_close(actual, reference.transform(operands.R, operands.G, operands.L, flat, operands.bias), "Y")


@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=4)), ids=str)
def test_outputs_not_needed_are_empty_and_the_rest_unchanged(need):
    shapes = CASES["mixed"]
    flat = Problems(shapes).flat
    R, G, L, dY, ddR, ddG, ddL, _ = random_operands(shapes, 2)
    pairs = list(zip(NATIVE.backward(R, G, L, dY, flat, need[:3]), NATIVE.backward(R, G, L, dY, flat, NEED_ALL)))
    every = [*NEED_ALL, True]
    pairs += zip(
        NATIVE.double_backward(R, G, L, dY, ddR, ddG, ddL, flat, need),
        NATIVE.double_backward(R, G, L, dY, ddR, ddG, ddL, flat, every),
    )
    for needed, (actual, expected) in zip([*need[:3], *need], pairs):
        assert actual.shape == (expected.shape if needed else (0,))
        if needed:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("missing", list(itertools.product([False, True], repeat=3)), ids=str)
def test_missing_cotangents_are_zeros(missing):
    shapes = CASES["mixed"]
    flat = Problems(shapes).flat
    operands = random_operands(shapes, 2)
    R, G, L, dY = operands[:4]
    given = [None if gone else X for gone, X in zip(missing, operands[4:7])]
    zeros = [torch.zeros_like(X) if gone else X for gone, X in zip(missing, operands[4:7])]
    expected = truth(Operands(R, G, L, dY, *zeros, operands.bias), shapes)
    outputs = NATIVE.double_backward(R, G, L, dY, *given, flat, [*NEED_ALL, True])
    for name, actual in zip(("second_R", "second_G", "second_L", "second_dY"), outputs):
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides_on_any_operand(kind):
    shapes = CASES["mixed"]
    plain = random_operands(shapes, 3)
    for i in range(7):
        operands = Operands(*(with_strides(X, kind) if i == j else X for j, X in enumerate(plain)))
        assert kind == "sliced" or not operands[i].is_contiguous()
        check_all(operands, shapes)
    check_all(Operands(*(with_strides(X, kind) for X in plain)), shapes)


def test_degenerate_groups():
    flat = Problems(CASES["mixed"]).flat
    for rows in ((0, 0), (1, 1)):
        outputs = run_all(random_operands(CASES["mixed"], 0, rows=rows), flat)
        assert outputs["Y"].shape == (0, Problems(CASES["mixed"]).packing.numel)
        for name in ("dR", "dL", "second_R", "second_L"):
            assert outputs[name].shape[0] == rows[0]
            assert not outputs[name].any()
    nothing = random_operands([], 2)
    assert all(output.shape == (2, 0) for output in run_all(nothing, []).values())


def test_bit_equal_at_any_number_of_threads():
    shapes = model_case(4)
    operands = random_operands(shapes, 5, rows=(1, 5), dtype=torch.float32)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run_all(operands, Problems(shapes).flat))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_not_a_number_stays_in_its_task():
    shapes = CASES["mixed"] + CASES["lane_edges"]
    flat = Problems(shapes).flat
    clean = random_operands(shapes, 3, dtype=torch.float32)
    dirty = Operands(*(X.clone() for X in clean))
    for X in dirty:
        X[1] = float("nan")
    for name, value in run_all(dirty, flat).items():
        expected = run_all(clean, flat)[name]
        assert torch.equal(value[::2], expected[::2]), name
        assert value[1].isnan().all(), name


def test_tasks_do_not_depend_on_their_neighbours():
    shapes = CASES["mixed"]
    flat = Problems(shapes).flat
    operands = random_operands(shapes, 4, dtype=torch.float32)
    alone = run_all(Operands(*(X[2:3] for X in operands)), flat)
    for name, value in run_all(operands, flat).items():
        assert torch.equal(value[2:3], alone[name]), name


def test_concurrent_callers():
    from concurrent.futures import ThreadPoolExecutor

    def work(seed: int) -> bool:
        shapes = [(seed + 1, seed + 2, 5), (1, 3, seed + 4)]
        operands = random_operands(shapes, 3, seed=seed)
        expected = truth(operands, shapes)
        for _ in range(20):
            for name, value in run_all(operands, Problems(shapes).flat).items():
                assert_close(value, expected[name], name)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": lambda X: X[:, 1:]}, "R"),
        ({"L": lambda X: X[:, 1:]}, "L"),
        ({"G": lambda X: X[:, 1:]}, "G"),
        ({"R": lambda X: X[:2]}, "R"),
        ({"L": lambda X: X[0]}, "L"),
        ({"R": lambda X: X.float()}, "R"),
    ],
    ids=["R_columns", "L_columns", "G_columns", "R_rows", "L_dims", "R_dtype"],
)
def test_operators_check_their_operands(change, message):
    operands = random_operands(CASES["mixed"], 3)._asdict()
    operands.update({name: make(operands[name]) for name, make in change.items()})
    with pytest.raises(ValueError, match=message):
        NATIVE.transform(operands["R"], operands["G"], operands["L"], Problems(CASES["mixed"]).flat)
    with pytest.raises(ValueError, match=message):
        NATIVE.backward(*(operands[name] for name in ("R", "G", "L", "dY")), Problems(CASES["mixed"]).flat, NEED_ALL)


@pytest.mark.parametrize("flat", [[1, 2], [0, 2, 2], [1, -2, 2], [2**40, 2**40, 1]], ids=str)
def test_operators_check_shapes(flat):
    R, G, L = (torch.randn(1, 4) for _ in range(3))
    with pytest.raises(ValueError, match="shapes"):
        NATIVE.transform(R, G, L, flat)


def test_operands_are_checked_before_the_work_is_planned():
    """A group far larger than its operands costs nothing but the message."""
    R, G, L = (torch.randn(1, 4) for _ in range(3))
    with pytest.raises(ValueError, match="G has 4 columns"):
        NATIVE.transform(R, G, L, [2**44, 1, 1])


def test_operators_check_need():
    R, G, L, dY, *_ = random_operands(CASES["linear"], 1)
    with pytest.raises(ValueError, match="need"):
        NATIVE.backward(R, G, L, dY, [1, 5, 7], [True, True])


def test_the_isa_asked_for_is_the_isa_in_use():
    import os

    wanted = os.environ.get("KFO_CPU_ISA")
    assert library.cpu_isa() in ("avx512", "avx2", "baseline")
    assert wanted in (None, library.cpu_isa())
