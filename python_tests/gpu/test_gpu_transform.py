"""The operators on the device against float64 autograd of the reference: every order, output, dtype and stride."""

from __future__ import annotations

import itertools

import pytest
import torch

from kfo_ext import transform
from kfo_ext.ops.transform import reference
from kfo_ext.problems import Problems
from kfo_ext.testing import (
    CASES,
    LARGE_CASES,
    OUTPUTS,
    STRIDES,
    Operands,
    assert_close,
    model_case,
    random_operands,
    run_all,
    run_order,
    truth,
    with_strides,
)

pytestmark = pytest.mark.gpu

TASKS = 3
GROUPS = CASES | LARGE_CASES | {f"CNN({layers})": model_case(layers) for layers in (2, 4)}
ROWS = {"per_task": None, "shared": (1, 1), "shared_R": (1, TASKS), "shared_L": (TASKS, 1)}
# Problems of unequal cost side by side, and more of them than the table of one launch holds.
GROUPS["many"] = [(1 + i % 5, 1 + i % 7, 1 + i % 11) for i in range(150)]
MIXED = CASES["mixed"]


def check_all(family, operands, shapes):
    expected = truth(operands, shapes)
    for name, actual in run_all(family, operands, Problems(shapes).flat).items():
        assert actual.device == operands.G.device, name
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_order_equals_truth(family, device, group, rows, dtype):
    operands = random_operands(GROUPS[group], TASKS, rows=ROWS[rows], dtype=dtype, device=device)
    check_all(family, operands, GROUPS[group])


@pytest.mark.parametrize("tasks", [1, 16, 64])
def test_task_counts(family, device, tasks):
    shapes = model_case(2)
    check_all(family, random_operands(shapes, tasks, dtype=torch.float32, device=device), shapes)


def test_fuzzed_shapes(family, device):
    draw = torch.Generator().manual_seed(2)
    for seed in range(40):
        sizes = torch.randint(1, 71, (1 + seed % 3, 3), generator=draw).tolist()
        shapes = [(1 + B % 40, p, q) for B, p, q in sizes]
        tasks = 1 + seed % 4
        rows = [(tasks, tasks), (1, 1), (tasks, 1), (1, tasks)][seed // 4 % 4]
        dtype = (torch.float32, torch.float64)[seed % 2]
        check_all(family, random_operands(shapes, tasks, rows=rows, dtype=dtype, device=device, seed=seed), shapes)


def test_uninitialised_memory_is_poisoned(device):
    assert torch.ones(3, device=device).new_empty(2).isnan().all()


def test_integer_operands_are_exact(family, device):
    shapes = MIXED + CASES["lane_edges"]
    like = random_operands(shapes, 2)
    operands = Operands(*(torch.randint(-3, 4, X.shape).float().to(device) for X in like))
    expected = truth(operands, shapes)
    for name, actual in run_all(family, operands, Problems(shapes).flat).items():
        assert torch.equal(actual.double(), expected[name]), name


@pytest.mark.parametrize("rows", [(TASKS, TASKS), (1, 1)], ids=str)
def test_forward_adds_the_bias(family, device, rows):
    flat = Problems(MIXED).flat
    R, G, L, *_, bias = random_operands(MIXED, TASKS, rows=rows, device=device)
    assert_close(family.transform(R, G, L, flat, bias), reference.transform(R, G, L, flat, bias), "Y")


@pytest.mark.parametrize("rows", ["per_task", "shared"])
@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=4)), ids=str)
def test_outputs_not_needed_are_empty_and_the_rest_unchanged(family, device, need, rows):
    flat = Problems(MIXED).flat
    operands = random_operands(MIXED, TASKS, rows=ROWS[rows], device=device)
    for order in ("backward", "double_backward"):
        every = run_order(family, order, operands, flat)
        for needed, actual, expected in zip(need, run_order(family, order, operands, flat, need), every):
            assert actual.shape == (expected.shape if needed else (0,))
            if needed:
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("missing", list(itertools.product([False, True], repeat=3)), ids=str)
def test_missing_cotangents_are_zeros(family, device, missing):
    flat = Problems(MIXED).flat
    operands = random_operands(MIXED, TASKS, device=device)
    cotangents = operands[4:7]
    given = [None if gone else X for gone, X in zip(missing, cotangents)]
    zeros = [torch.zeros_like(X) if gone else X for gone, X in zip(missing, cotangents)]
    expected = truth(Operands(*operands[:4], *zeros, operands.bias), MIXED)
    outputs = family.double_backward(*operands[:4], *given, flat, [True] * 4)
    for name, actual in zip(OUTPUTS["double_backward"], outputs):
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides_on_any_operand(family, device, kind):
    plain = random_operands(MIXED, TASKS, device=device)
    for i in range(7):
        check_all(family, Operands(*(with_strides(X, kind) if i == j else X for j, X in enumerate(plain))), MIXED)
    check_all(family, Operands(*(with_strides(X, kind) for X in plain)), MIXED)


def test_an_operand_may_start_anywhere_in_its_storage(family, device):
    """Rows at addresses that are multiples of no vector width."""
    for offset in (1, 2, 3):
        operands = random_operands(MIXED, TASKS, dtype=torch.float32, device=device)
        moved = (torch.cat([X.new_zeros(offset), X.flatten()])[offset:].view(X.shape) for X in operands)
        check_all(family, Operands(*moved), MIXED)


@pytest.mark.parametrize("rows", [(0, 0), (1, 1)], ids=str)
def test_no_tasks(family, device, rows):
    outputs = run_all(family, random_operands(MIXED, 0, rows=rows, device=device), Problems(MIXED).flat)
    assert outputs["Y"].shape == (0, Problems(MIXED).packing.numel)
    for name in ("dR", "dL", "second_R", "second_L"):
        assert outputs[name].shape[0] == rows[0]
        assert not outputs[name].any(), name


def test_no_problems(family, device):
    assert all(X.shape == (2, 0) for X in run_all(family, random_operands([], 2, device=device), []).values())


def test_not_a_number_stays_in_its_task(family, device):
    shapes = MIXED + CASES["lane_edges"]
    flat = Problems(shapes).flat
    clean = random_operands(shapes, TASKS, dtype=torch.float32, device=device)
    dirty = Operands(*(X.clone() for X in clean))
    for X in dirty:
        X[1] = float("nan")
    expected = run_all(family, clean, flat)
    for name, value in run_all(family, dirty, flat).items():
        assert torch.equal(value[::2], expected[name][::2]), name
        assert value[1].isnan().all(), name


@pytest.mark.parametrize("rows", ["per_task", "shared"])
@pytest.mark.parametrize("group", ["CNN(4)", "conv_64", "head_5x1600"])
def test_two_runs_are_bit_equal(family, device, group, rows):
    shapes = GROUPS[group]
    flat = Problems(shapes).flat
    operands = random_operands(shapes, TASKS, rows=ROWS[rows], dtype=torch.float32, device=device)
    first = run_all(family, operands, flat)
    for _ in range(3):
        for name, value in run_all(family, operands, flat).items():
            assert torch.equal(value, first[name]), name


def test_public_transform_takes_the_backend(backend, family, device):
    problems = Problems(MIXED)
    R, G, L, *_, bias = random_operands(MIXED, TASKS, dtype=torch.float32, device=device)
    Y = transform(R, G, L, problems, bias=bias, backend=backend)
    assert torch.equal(Y, family.transform(R, G, L, problems.flat, bias))
    half = transform(R.half(), G.half(), L.half(), problems, backend=backend)
    assert half.dtype == torch.float16


def test_operands_on_several_devices_are_refused(backend, family, cuda):
    """The host beside the device, and a second device where there is one."""
    problems = Problems(MIXED)
    R, G, L, dY, *_ = random_operands(MIXED, TASKS, device=cuda)
    for other in ["cpu", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]:
        with pytest.raises(ValueError, match="R"):
            transform(R.to(other), G, L, problems, backend=backend)
        with pytest.raises(ValueError, match="L"):
            family.transform(R, G, L.to(other), problems.flat)
        with pytest.raises(ValueError, match="dY"):
            family.backward(R, G, L, dY.to(other), problems.flat, [True] * 3)


def test_a_device_that_is_not_current(family, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device alone")
    assert torch.cuda.current_device() == 0
    check_all(family, random_operands(MIXED, TASKS, device="cuda:1"), MIXED)
