"""Batch norm + ReLU on the device: every order against float64, derivatives, repeatability, graphs and streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kfo_ext.functional import batch_norm_relu
from kfo_ext.ops.batch_norm import reference
from kfo_ext.ops.batch_norm.autograd import BATCH_NORM
from kfo_ext.ops.batch_norm.op import OPERATOR
from kfo_ext.testing import relative_error

pytestmark = pytest.mark.gpu

EPS = 1e-5
EVERY = [True, True, True]
# 16-byte accesses and none, one chunk of rows and many, several groups of channels; the networks' own sizes.
SIZES = [(1, 3, 1), (3, 33, 5), (2, 70, 36), (16, 4900, 32), (16, 1225, 64), (1, 25600, 64), (2, 100_000, 4)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5}
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
rows_param = pytest.mark.parametrize("shared", [False, True], ids=["per_task", "shared"])


@pytest.fixture(autouse=True)
def native_runs(device):
    try:
        OPERATOR.resolve("native", device)
    except RuntimeError as error:
        pytest.skip(str(error))


def draw(size, device, shared=False, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x, weight, bias, dy, ddx, ddweight, ddbias; no value so near the ReLU's corner that rounding decides."""
    tasks, _, channels = size
    generator = torch.Generator().manual_seed(seed)
    parameters = (1 if shared else tasks, channels)
    shapes = (size, parameters, parameters, size, size, parameters, parameters)
    x, weight, bias, *rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    weight = weight.sign() * (0.5 + weight.abs())
    # Twice: what is moved away moves the statistics.
    for _ in range(2):
        near = reference.batch_norm_relu(x, weight, bias, EPS, False).abs() < 2e-3
        x = torch.where(near, x + 0.05, x)
    return [value.to(dtype).to(device) for value in (x, weight, bias, *rest)]


def run(X: list[Tensor], relu: bool = True) -> list[Tensor]:
    x, weight, bias, dy, *dd = X
    y, mean, rstd = BATCH_NORM.forward(x, weight, bias, EPS, relu)
    state = (x, weight, bias, mean, rstd, dy)
    first = BATCH_NORM.backward(*state, relu, EVERY)
    return [y, *first, *BATCH_NORM.double_backward(*state, *dd, relu, EVERY)]


def truth(X: list[Tensor], relu: bool = True) -> list[Tensor]:
    x, weight, bias, dy, *dd = (value.double().requires_grad_() for value in X)
    y = reference.batch_norm_relu(x, weight, bias, EPS, relu)
    first = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    second = torch.autograd.grad(sum((d * other).sum() for d, other in zip(first, dd)), (x, weight, dy))
    return [value.detach() for value in (y, *first, *second)]


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    names = ("y", "dx", "dweight", "dbias", "second_x", "second_weight", "second_dy")
    for name, a, b in zip(names, actual, expected):
        assert a.shape == b.shape, name
        assert relative_error(a, b) <= TOLERANCE[a.dtype], f"{name}: {relative_error(a, b):.2e}"


@sizes
@rows_param
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_order_equals_float64(device, size, shared, dtype):
    X = draw(size, device, shared, dtype)
    for relu in (True, False):
        check(run(X, relu), truth(X, relu))


def test_far_means(device):
    x, *_ = draw((2, 5000, 32), device)
    x = x + 1000
    _, mean, rstd = BATCH_NORM.forward(x, torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0]), EPS, True)
    wide = x.double()
    assert relative_error(mean, wide.mean(1)) < 1e-6
    assert relative_error(rstd, (wide.var(1, unbiased=False) + EPS).rsqrt()) < 1e-5


def test_addresses_off_16_bytes(device):
    X = draw((2, 70, 36), device)
    moved = [torch.empty(value.numel() + 1, device=device)[1:].view(value.shape).copy_(value) for value in X]
    for a, b in zip(run(moved), run(X)):
        assert torch.equal(a, b)


def test_no_tasks(device):
    out = run(draw((0, 5, 3), device, shared=True))
    assert out[0].shape == (0, 5, 3)
    assert not any(out[i].any() for i in (2, 3, 5))


def test_calls_repeat_bit_by_bit(device):
    X = draw((16, 1225, 64), device, shared=True)
    first = run(X)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(X), first))


def test_not_a_number_stays_in_its_task(device):
    X = draw((3, 70, 36), device)
    clean = run(X)
    X[0][1, 5, 2] = float("nan")
    for a, b in zip(run(X), clean):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])


@rows_param
def test_derivatives(device, shared):
    X = [value.requires_grad_() for value in draw((2, 5, 3), device, shared, torch.float64)]

    def public(*P):
        return batch_norm_relu(*P, eps=1e-2, backend="native")

    assert gradcheck(public, X[:3])
    assert gradgradcheck(public, X[:3])

    def double_backward(x, weight, bias, dy, *dd):
        with torch.no_grad():
            _, mean, rstd = BATCH_NORM.forward(x, weight, bias, 1e-2, True)
        return BATCH_NORM.double_backward(x, weight, bias, mean, rstd, dy, *dd, True, EVERY)

    assert gradcheck(double_backward, X)


def test_a_captured_graph_follows_its_inputs(cuda):
    X = draw((4, 1225, 32), cuda, shared=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(X)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(X)
    for seed in (1, 2):
        for value, changed in zip(X, draw((4, 1225, 32), cuda, shared=True, seed=seed)):
            value.copy_(changed)
        graph.replay()
        check(outputs, truth(X))


def test_a_call_allocates_its_outputs_and_one_scratch(cuda):
    X = draw((4, 1225, 32), cuda, shared=True)
    _, mean, rstd = BATCH_NORM.forward(*X[:3], EPS, True)
    state = (*X[:3], mean, rstd, X[3])
    calls = (
        lambda: BATCH_NORM.forward(*X[:3], EPS, True),
        lambda: BATCH_NORM.backward(*state, True, EVERY),
        lambda: BATCH_NORM.double_backward(*state, *X[4:], True, EVERY),
    )
    for call in calls:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        outputs = call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= len(outputs) + 1
