"""The compiled convolution operators on the device: values against float64, derivatives, repeatability, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kfo_ext.functional import conv2d
from kfo_ext.ops.conv2d.autograd import CONV
from kfo_ext.ops.conv2d.op import OPERATOR
from kfo_ext.testing import relative_error

pytestmark = pytest.mark.gpu

# tasks, images, height, width, in channels, out channels, kernel height, kernel width, stride, padding: the networks'
# own; several tiles for each block; edges of tiles; phases without taps.
SIZES = [
    (16, 25, 28, 28, 1, 32, 3, 3, 2, 1), (16, 25, 14, 14, 32, 32, 3, 3, 2, 1), (4, 25, 32, 32, 3, 32, 3, 3, 1, 1),
    (16, 25, 32, 32, 32, 32, 3, 3, 1, 1), (2, 25, 16, 16, 64, 64, 3, 3, 1, 1), (3, 5, 9, 7, 33, 65, 5, 3, 2, 2),
    (2, 3, 7, 8, 4, 5, 2, 1, 3, 0), (1, 2, 4, 5, 3, 4, 3, 3, 9, 2), (2, 0, 4, 4, 2, 3, 3, 3, 1, 1),
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


@pytest.fixture(autouse=True)
def native_runs(device):
    try:
        OPERATOR.resolve("native", device)
    except RuntimeError as error:
        pytest.skip(str(error))


def draw(size, device, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x, weight, dy."""
    T, N, H, W, C, out, KH, KW, stride, padding = size
    generator = torch.Generator().manual_seed(seed)
    rows, columns = ((n + 2 * padding - k) // stride + 1 for n, k in ((H, KH), (W, KW)))
    shapes = ((T, N, H, W, C), (T, out, C, KH, KW), (T, N, rows, columns, out))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device) for shape in shapes]


def run(X: list[Tensor], size) -> list[Tensor]:
    """y, dx, dweight."""
    x, weight, dy = X
    stride, padding = size[-2:]
    return [
        CONV.conv2d(x, weight, stride, padding),
        CONV.input(dy, weight, list(x.shape[2:4]), stride, padding),
        CONV.weight(x, dy, list(weight.shape[3:]), stride, padding),
    ]


def truth(X: list[Tensor], size) -> list[Tensor]:
    """torch's own in float64, task after task."""
    out = []
    stride, padding = size[-2:]
    for x, weight, dy in zip(*(value.double() for value in X)):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = torch.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=padding).permute(0, 2, 3, 1)
        out.append([y.detach(), *torch.autograd.grad(y, (x, weight), dy)])
    return [torch.stack(values) for values in zip(*out)]


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("y", "dx", "dweight"), actual, expected, strict=True):
        assert a.shape == b.shape, name
        assert relative_error(a, b) <= TOLERANCE[a.dtype], f"{name}: {relative_error(a, b):.2e}"


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_three_operators_equal_float64(device, size, dtype):
    X = draw(size, device, dtype)
    check(run(X, size), truth(X, size))


def test_weights_that_tasks_share_and_other_strides(device):
    size = SIZES[1]
    x, weight, dy = draw(size, device)
    shared = [x, weight[:1].expand(weight.shape), dy]
    check(run(shared, size), truth(shared, size))
    strided = [X.transpose(1, 2).contiguous().transpose(1, 2) for X in (x, weight, dy)]
    for a, b in zip(run(strided, size), run([x, weight, dy], size)):
        assert torch.equal(a, b)


def test_addresses_off_16_bytes(device):
    X = draw(SIZES[1], device)
    moved = [torch.empty(value.numel() + 1, device=device)[1:].view(value.shape).copy_(value) for value in X]
    for a, b in zip(run(moved, SIZES[1]), run(X, SIZES[1])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", SIZES[:4], ids=lambda size: "x".join(map(str, size)))
def test_calls_repeat_bit_by_bit(device, size):
    X = draw(size, device)
    first = run(X, size)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(X, size), first))


def test_not_a_number_stays_in_its_task(device):
    X = draw((3, *SIZES[1][1:]), device)
    clean = run(X, SIZES[1])
    X[0][1, 5, 2] = float("nan")
    for name, a, b in zip(("y", "dx", "dweight"), run(X, SIZES[1]), clean):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        assert a[1].isnan().any() == (name != "dx")


def test_derivatives(device):
    X = [value.requires_grad_() for value in draw((2, 2, 5, 4, 3, 2, 3, 2, 2, 1), device, torch.float64)[:2]]

    def public(x, weight):
        return conv2d(x, weight, stride=2, padding=1, backend="native")

    assert gradcheck(public, X)
    assert gradgradcheck(public, X)


def test_a_captured_graph_follows_its_inputs(cuda):
    size = SIZES[1]
    X = draw(size, cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(X, size)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(X, size)
    for seed in (1, 2):
        for value, changed in zip(X, draw(size, cuda, seed=seed)):
            value.copy_(changed)
        graph.replay()
        check(outputs, truth(X, size))
