"""Operands at the edges: huge strides and paddings, empty sizes, groups beyond 64 bit, layouts that are not dense.

Each is right, by plain torch in float64 for each task, or a ValueError or TypeError that names the argument.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from kfo_ext import KFO
from kfo_ext.functional import batch_norm_relu, conv2d, transform
from kfo_ext.ops import library
from kfo_ext.problems import Problems

HUGE = (20_000, 2**31, 2**40, 2**62, 2**63 - 1)
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(not library.status()["cpu"][0], reason="no compiled CPU library")),
    "reference",
]
compiled = pytest.mark.skipif(not library.status()["cpu"][0], reason="no compiled CPU library")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def orders(run, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """y, its gradients by x and weight, and theirs by x, weight and dy, for fixed cotangents."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = run(x, weight)
    generator = torch.Generator().manual_seed(1)
    dy, ddx, ddw = (torch.randn(X.shape, generator=generator, dtype=X.dtype) for X in (y, x, weight))
    dy.requires_grad_()
    first = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
    inner = (first[0] * ddx).sum() + (first[1] * ddw).sum()
    return [y, *first, *torch.autograd.grad(inner, (x, weight, dy))]


def task_by_task(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """The definition: torch's convolution of each task's images, in float64, of an image that is padded by hand."""
    images = F.pad(x.permute(0, 1, 4, 2, 3), (padding,) * 4)
    return torch.stack([F.conv2d(X, w, stride=stride) for X, w in zip(images, weight)]).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", HUGE)
def test_a_stride_beyond_the_image_leaves_one_result(stride, backend):
    x, weight = draw(2, 3, 5, 6, 2), draw(2, 4, 2, 3, 3)
    ours = orders(lambda x, weight: conv2d(x, weight, stride=stride, padding=1, backend=backend), x, weight)
    # 8 is as far as the padded image reaches.
    truth = orders(lambda x, weight: task_by_task(x, weight, 8, 1), x, weight)
    assert ours[0].shape == (2, 3, 1, 1, 4)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@compiled
@pytest.mark.parametrize("stride", HUGE)
def test_the_operators_themselves_take_a_huge_stride(stride):
    ops = torch.ops.kfo_ext
    x, weight, dy = draw(2, 3, 5, 6, 2), draw(2, 4, 2, 3, 3), draw(2, 3, 1, 1, 4)
    wide = [ops.conv2d(x, weight, stride, 1), ops.conv2d_input(dy, weight, [5, 6], stride, 1)]
    wide.append(ops.conv2d_weight(x, dy, [3, 3], stride, 1))
    near = [ops.conv2d(x, weight, 8, 1), ops.conv2d_input(dy, weight, [5, 6], 8, 1)]
    near.append(ops.conv2d_weight(x, dy, [3, 3], 8, 1))
    assert all(map(torch.equal, wide, near))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((9, 7), (3, 2), 4, 0),
        ((9, 7), (2, 3), 3, 2),
        ((5, 5), (3, 3), 7, 7),
        ((4, 11), (1, 4), 3, 5),
        ((6, 6), (1, 1), 5, 0),
        ((40, 3), (3, 3), 30, 40),
        ((1, 1), (2, 2), 2, 1),
        ((1, 1), (1, 2), 1, 1),
    ],
)
def test_strides_beyond_the_kernel_and_single_pixels(size, kernel, stride, padding, backend):
    images = 1 if size == (1, 1) else 2
    x, weight = draw(2, images, *size, 3), draw(2, 5, 3, *kernel)
    ours = orders(lambda x, w: conv2d(x, w, stride=stride, padding=padding, backend=backend), x, weight)
    truth = orders(lambda x, w: task_by_task(x, w, stride, padding), x, weight)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [10_000, 2**29, 2**31, 2**40, 2**59])
def test_a_huge_padding_with_as_huge_a_stride(step, backend):
    # Nine results, of which the middle one sees the image from its first pixel on.
    x, weight = draw(1, 1, 5, 5, 2), draw(1, 3, 2, 3, 3)
    if backend == "reference" and step >= 2**31:
        with pytest.raises(ValueError, match=r"^padding: expected padded images of at most 2147483647 pixels"):
            conv2d(x, weight, stride=step, padding=step, backend=backend)
        return
    ours = orders(lambda x, w: conv2d(x, w, stride=step, padding=step, backend=backend), x, weight)

    def middle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.pad(task_by_task(x, weight, 5, 0), (0, 0, 1, 1, 1, 1))

    for got, expected in zip(ours, orders(middle, x, weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [2**60 + 1, 2**62, 2**63 - 1, 2**70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padding_beyond_64_bit_is_refused(padding, backend):
    with pytest.raises(ValueError, match=r"^padding: expected at most"):
        conv2d(draw(1, 1, 5, 5, 1), draw(1, 1, 1, 3, 3), padding=padding, backend=backend)


@compiled
def test_the_operators_themselves_refuse_what_they_cannot_address():
    ops = torch.ops.kfo_ext
    x, weight, dy = draw(1, 1, 5, 5, 1), draw(1, 1, 1, 3, 3), draw(1, 1, 1, 1, 1)
    most = 2**63 - 1
    for padding in (2**60 + 1, 2**62, most):
        for call in (
            lambda p=padding: ops.conv2d(x, weight, 1, p),
            lambda p=padding: ops.conv2d_input(dy, weight, [5, 5], 1, p),
            lambda p=padding: ops.conv2d_weight(x, dy, [3, 3], 1, p),
        ):
            with pytest.raises(ValueError, match="padding: expected from 0 to"):
                call()
    with pytest.raises(ValueError, match=r"padding: .* too large to address with 64 bits"):
        ops.conv2d(x, weight, 1, 2**59)
    for size in ([-1, 5], [5, 0], [-most, -most]):
        with pytest.raises(ValueError, match=r"(height|width): expected at least 1"):
            ops.conv2d_input(dy, weight, size, 1, 1)
    with pytest.raises(ValueError, match="too large to address"):
        ops.conv2d_input(dy, weight, [most, most], most, 0)
    for kernel in ([-1, 3], [0, 3], [most, 3]):
        with pytest.raises(ValueError, match="does not fit images"):
            ops.conv2d_weight(x, dy, kernel, 1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_have_no_results_and_zero_gradients(backend):
    x, weight = draw(2, 0, 5, 5, 3).requires_grad_(), draw(2, 4, 3, 3, 3).requires_grad_()
    y = conv2d(x, weight, backend=backend)
    assert y.shape == (2, 0, 3, 3, 4)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "weight", "named"),
    [
        ((2, 2, 5, 5, 0), (2, 4, 0, 3, 3), "x: expected height, width and channels of at least 1"),
        ((2, 2, 0, 5, 3), (2, 4, 3, 1, 1), "x: expected height, width and channels of at least 1"),
        ((2, 2, 5, 5, 3), (2, 0, 3, 3, 3), "weight: expected at least 1 out channel"),
    ],
)
def test_no_channels_and_no_pixels_are_refused(x, weight, named, backend):
    with pytest.raises(ValueError, match=f"^{named}"):
        conv2d(draw(*x), draw(*weight), padding=1, backend=backend)


@compiled
def test_the_operators_themselves_refuse_no_channels():
    ops = torch.ops.kfo_ext
    for channels, out in ((0, 4), (3, 0)):
        x, weight, dy = draw(2, 2, 5, 5, channels), draw(2, out, channels, 3, 3), draw(2, 2, 3, 3, out)
        for call in (
            lambda x=x, weight=weight: ops.conv2d(x, weight, 1, 0),
            lambda dy=dy, weight=weight: ops.conv2d_input(dy, weight, [5, 5], 1, 0),
            lambda x=x, dy=dy: ops.conv2d_weight(x, dy, [3, 3], 1, 0),
        ):
            with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
                call()
    assert ops.conv2d(draw(0, 2, 5, 5, 3), draw(0, 4, 3, 3, 3), 1, 0).shape == (0, 2, 3, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_refuses_one_value_per_channel_as_torch_does(rows, backend):
    # torch names a size; for a task's own batch that is rows.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        F.batch_norm(torch.randn(1, 3), None, None, training=True)
    with pytest.raises(ValueError, match=r"^x: expected at least 2 rows, got shape \(2, "):
        batch_norm_relu(draw(2, rows, 3), draw(1, 3), draw(2, 3), backend=backend)


@compiled
@pytest.mark.parametrize("rows", [0, 1])
def test_the_batch_norm_operators_refuse_it_too(rows):
    ops = torch.ops.kfo_ext
    x, row = draw(2, rows, 3), draw(2, 3)
    for call in (
        lambda: ops.batch_norm_relu(x, row, row, 1e-5, True),
        lambda: ops.batch_norm_relu_backward(x, row, row, row, row, x, True, [True] * 3),
        lambda: ops.batch_norm_relu_double_backward(x, row, row, row, row, x, x, row, row, True, [True] * 3),
    ):
        with pytest.raises(ValueError, match=f"x has {rows} rows, expected at least 2"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tasks", "channels"), [(2, 0), (0, 3), (0, 0)])
def test_batch_norm_of_nothing_is_empty(tasks, channels, backend):
    x, weight = draw(tasks, 4, channels).requires_grad_(), draw(1, channels).requires_grad_()
    bias = draw(1, channels).requires_grad_()
    y = batch_norm_relu(x, weight, bias, backend=backend)
    assert y.shape == x.shape
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([(2**21, 2**21, 2**21)], r"shapes\[0\]: .* that of G has 9223372036854775808"),
        ([(1, 2**32, 1)], r"shapes\[0\]: .* that of R has 18446744073709551616"),
        ([(1, 1, 2**32)], r"shapes\[0\]: .* that of L has"),
        ([(1, 1, 2**70)], r"shapes\[0\]: "),
        ([(2**62, 1, 1), (1, 2, 2), (2**62, 1, 1)], r"shapes\[2\]: .* that of G has"),
        ([(1, 3_000_000_000, 1), (1, 3_000_000_000, 1)], r"shapes\[1\]: .* that of R has"),
    ],
)
def test_groups_beyond_64_bit_are_refused(shapes, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        Problems(shapes)


def test_a_group_of_63_bit_can_be_described():
    assert Problems([(2**62, 1, 1)]).packing.numel == 2**62


LAYOUTS = {
    "torch.sparse_coo": lambda X: X.to_sparse(),
    "torch.sparse_csr": lambda X: X.to_sparse_csr(),
    "torch.sparse_csc": lambda X: X.to_sparse_csc(),
    "torch.sparse_bsr": lambda X: X.to_sparse_bsr((1, 1)),
    "torch._mkldnn": lambda X: X.to_mkldnn(),
    "nested": lambda X: torch.nested.nested_tensor([*X]),
    "jagged": lambda X: torch.nested.nested_tensor([*X], layout=torch.jagged),
    "quantized": lambda X: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
}


# Of torch: these layouts are betas, and some are to go.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_function_refuses_other_layouts(layout):
    odd = LAYOUTS[layout](torch.randn(2, 4))
    # A word of the message: a jagged tensor is a nested one.
    word = re.escape("nested" if layout == "jagged" else layout)
    dense = torch.randn(2, 4)
    problems = Problems([(1, 2, 2)])
    for at, name in enumerate(("R", "G", "L", "bias")):
        operands = [odd if i == at else dense for i in range(4)]
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*{word}"):
            transform(*operands[:3], problems, bias=operands[3])
    images, kernels = torch.randn(1, 2, 4, 4, 3), torch.randn(1, 2, 3, 3, 3)
    for name, call in {
        "x": lambda: conv2d(odd, kernels),
        "weight": lambda: conv2d(images, odd),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*{word}"):
            call()
    rows = torch.randn(2, 3, 4)
    for at, name in enumerate(("x", "weight", "bias")):
        operands = [odd if i == at else (dense if i else rows) for i in range(3)]
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*{word}"):
            batch_norm_relu(*operands)
    kfo = KFO([("w", torch.randn(2, 4))])
    with pytest.raises(TypeError, match=rf"^grads\['w'\]: expected a dense tensor, got .*{word}"):
        kfo.transform([odd])


def test_meta_and_fake_tensors_are_dense():
    from torch._subclasses.fake_tensor import FakeTensorMode

    problems = Problems([(3, 2, 2)])
    with FakeTensorMode() as mode:
        for device in ("cpu", "meta"):
            R, G = torch.empty(2, 4, device=device), torch.empty(2, 12, device=device)
            assert transform(R, G, R, problems).shape == (2, 12)
            x, weight = torch.empty(2, 3, 5, 5, 2, device=device), torch.empty(2, 4, 2, 3, 3, device=device)
            assert conv2d(x, weight, stride=2**40).shape == (2, 3, 1, 1, 4)
            rows, row = torch.empty(2, 3, 4, device=device), torch.empty(1, 4, device=device)
            assert batch_norm_relu(rows, row, row).shape == (2, 3, 4)
        assert mode is not None
    R, G = torch.empty(2, 4, device="meta"), torch.empty(2, 12, device="meta")
    assert transform(R, G, R, problems).device.type == "meta"
