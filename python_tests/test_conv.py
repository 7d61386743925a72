"""`functional.conv2d` and its derivatives of every order, against plain torch in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kfo_ext.functional import conv2d
from kfo_ext.ops import library
from kfo_ext.ops.conv2d.autograd import CONV, GROUPED
from kfo_ext.ops.conv2d.op import OPERATOR
from kfo_ext.testing import relative_error

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the CPU library is not built")

# name -> tasks, images, height, width, in channels, out channels, kernel height, kernel width, stride, padding
CASES = {
    "square": (2, 3, 7, 6, 5, 17, 3, 3, 2, 1),
    "one_channel": (3, 2, 5, 5, 1, 4, 3, 2, 1, 1),
    "one_tap": (1, 4, 4, 9, 3, 33, 1, 1, 1, 0),
    "stride_past_kernel": (2, 2, 9, 8, 2, 3, 2, 1, 3, 0),
    "padding_past_kernel": (2, 1, 5, 5, 2, 3, 2, 2, 4, 2),
    "padding_past_image": (2, 1, 1, 1, 2, 3, 1, 1, 8, 2),
    "tall_kernel": (2, 1, 9, 9, 2, 20, 5, 3, 2, 2),
    "lane_edges": (1, 3, 8, 8, 31, 49, 3, 3, 1, 1),
    "no_images": (2, 0, 4, 4, 2, 3, 3, 3, 1, 1),
    "omniglot": (2, 5, 28, 28, 1, 32, 3, 3, 2, 1),
    "block": (4, 5, 14, 14, 32, 32, 3, 3, 2, 1),
    "rows_past_one_chunk": (1, 1, 5, 150, 2, 3, 3, 3, 1, 1),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

cases = pytest.mark.parametrize("case", CASES)
backends = pytest.mark.parametrize("backend", ["native", "grouped"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def operands(case: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    T, N, H, W, C, out, KH, KW, stride, padding = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, N, H, W, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(T, out, C, KH, KW, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), {"stride": stride, "padding": padding}


def by_task(x, weight, stride, padding):
    """torch's own convolution, task after task."""
    ys = [
        torch.conv2d(a.permute(0, 3, 1, 2), b, stride=stride, padding=padding).permute(0, 2, 3, 1)
        for a, b in zip(x, weight)
    ]
    return torch.stack(ys)


def derivatives(function, x, weight, cotangents, fixed) -> list[torch.Tensor]:
    """y, its gradients, and theirs; `cotangents` are of y, dx and dweight. One missing cotangent at a time, too."""
    x, weight, dy, ddx, ddweight = (X.detach().requires_grad_() for X in (x, weight, *cotangents))
    y = function(x, weight, **fixed)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
    out = [y, dx, dweight]
    for outputs, given in (((dx, dweight), (ddx, ddweight)), ((dx,), (ddx,)), ((dweight,), (ddweight,))):
        second = torch.autograd.grad(
            outputs, (x, weight, dy), given, create_graph=True, allow_unused=True, materialize_grads=True
        )
        out += second
        third = torch.autograd.grad(
            sum((X * X).sum() for X in second), (x, weight, dy), allow_unused=True, materialize_grads=True
        )
        out += third
    return [X.detach() for X in out]


def random_cotangents(x, weight, fixed) -> list[torch.Tensor]:
    like, generator = (conv2d(x, weight, **fixed), x, weight), torch.Generator().manual_seed(1)
    return [torch.randn(X.shape, generator=generator).to(X) for X in like]


def check(x, weight, cotangents, fixed, backend) -> None:
    wide = [X.double() for X in (x, weight, *cotangents)]
    expected = derivatives(by_task, wide[0], wide[1], wide[2:], fixed)
    found = derivatives(partial(conv2d, backend=backend), x, weight, cotangents, fixed)
    for i, (actual, right) in enumerate(zip(found, expected, strict=True)):
        assert actual.shape == right.shape, i
        if right.numel():
            assert relative_error(actual, right) <= TOLERANCE[x.dtype] * (1 if i < 3 else 10), i


@backends
@dtypes
@cases
def test_every_order_equals_torch(case, dtype, backend):
    x, weight, fixed = operands(case, dtype)
    if case.startswith("padding_past") or 0 in x.shape:
        # torch itself has no second derivative there.
        expected = by_task(x.double(), weight.double(), **fixed)
        dy = torch.randn_like(expected)
        leaves = [X.double().requires_grad_() for X in (x, weight)]
        right = torch.autograd.grad(by_task(*leaves, **fixed), leaves, dy)
        ours = [X.clone().requires_grad_() for X in (x, weight)]
        y = conv2d(*ours, **fixed, backend=backend)
        for actual, truth in zip((y, *torch.autograd.grad(y, ours, dy.to(dtype))), (expected, *right)):
            torch.testing.assert_close(actual.double(), truth, rtol=0, atol=TOLERANCE[dtype] * 30)
        return
    check(x, weight, random_cotangents(x, weight, fixed), fixed, backend)


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "native") for case in CASES), ("one_channel", "grouped"), ("no_images", "grouped")]
)
def test_gradcheck_and_gradgradcheck(case, backend):
    x, weight, fixed = operands(case)
    if x.numel() * weight.numel() > 20000:
        pytest.skip("too large for numerical derivatives")
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(lambda a, b: conv2d(a, b, **fixed, backend=backend), leaves)
    assert gradgradcheck(lambda a, b: conv2d(a, b, **fixed, backend=backend), leaves)


@backends
def test_opcheck(backend):
    x, weight, fixed = operands("square")
    x, weight = x.requires_grad_(), weight.requires_grad_()
    dy = conv2d(x, weight, **fixed).detach().requires_grad_()
    family, numbers = {"native": CONV, "grouped": GROUPED}[backend], tuple(fixed.values())
    for op, arguments in (
        (family.conv2d, (x, weight, *numbers)),
        (family.input, (dy, weight, [7, 6], *numbers)),
        (family.weight, (x, dy, [3, 3], *numbers)),
    ):
        torch.library.opcheck(op, arguments)
        shuffled = tuple(_shuffled(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        # Tracing torch's convolution with sizes that are symbols takes long.
        tests = ("test_schema", "test_faketensor") if backend == "grouped" else None
        torch.library.opcheck(op, shuffled, **({"test_utils": tests} if tests else {}))


def _shuffled(X: torch.Tensor) -> torch.Tensor:
    """The same values in memory laid out backwards."""
    return X.detach().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0).requires_grad_(X.requires_grad)


def _sliced(X: torch.Tensor) -> torch.Tensor:
    return torch.stack([X, X + 1], -1)[..., 0]


def _shared(X: torch.Tensor) -> torch.Tensor:
    return X[:1].expand(X.shape)


@backends
@pytest.mark.parametrize("change", [_shuffled, _sliced, _shared], ids=["shuffled", "sliced", "shared"])
def test_any_strides_on_any_operand(change, backend):
    x, weight, fixed = operands("square")
    cotangents = random_cotangents(x, weight, fixed)
    for i in range(5):
        changed = [change(X) if i == j else X for j, X in enumerate((x, weight, *cotangents))]
        check(changed[0], changed[1], changed[2:], fixed, backend)


@backends
def test_a_result_may_be_changed_in_place(backend):
    x, weight, fixed = operands("square")
    found, expected = (
        torch.autograd.grad(function(x.requires_grad_(), weight.requires_grad_()).square().sum(), (x, weight))
        for function in (
            lambda a, b: conv2d(a, b, **fixed, backend=backend).relu_(),
            lambda a, b: by_task(a, b, **fixed).relu(),
        )
    )
    for actual, right in zip(found, expected):
        torch.testing.assert_close(actual, right)


def test_integers_are_exact():
    x, weight, fixed = operands("lane_edges", torch.float32)
    x, weight = (X.mul(3).round() for X in (x, weight))
    assert torch.equal(conv2d(x, weight, **fixed).double(), by_task(x.double(), weight.double(), **fixed))


@backends
def test_not_finite_stays_in_its_task(backend):
    x, weight, fixed = operands("square")
    clean = conv2d(x, weight, **fixed, backend=backend)
    x[1] = float("nan")
    dirty = conv2d(x, weight, **fixed, backend=backend)
    assert torch.equal(dirty[0], clean[0])
    assert dirty[1].isnan().all()


@pytest.mark.parametrize("case", ["block", "lane_edges"])
def test_bit_equal_at_any_number_of_threads(case):
    x, weight, fixed = operands(case, torch.float32)
    cotangents = random_cotangents(x, weight, fixed)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(derivatives(conv2d, x, weight, cotangents, fixed))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("case", ["square", "tall_kernel"])
def test_plain_torch_where_there_are_no_rules(case):
    x, weight, fixed = operands(case)
    expected = by_task(x, weight, **fixed)
    torch.testing.assert_close(conv2d(x, weight, **fixed, backend="reference"), expected)
    _, tangent = torch.func.jvp(lambda a: conv2d(a, weight, **fixed), (x,), (x,))
    torch.testing.assert_close(tangent, expected)


def test_half_types_and_autocast_compute_in_float32():
    x, weight, fixed = operands("square", torch.float32)
    x, weight = x.bfloat16(), weight.bfloat16()
    wide = conv2d(x.float(), weight.float(), **fixed)
    assert torch.equal(conv2d(x, weight, **fixed), wide.bfloat16())
    for backend in ("native", "grouped", "reference"):
        with torch.autocast("cpu"):
            torch.testing.assert_close(conv2d(x, weight, **fixed, backend=backend), wide)


@pytest.mark.parametrize("kernels", [("cpu",), ()], ids=["native", "grouped"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_autocast_means_torchs_own_convolution_in_its_type(channels_last, kernels, monkeypatch):
    monkeypatch.setattr(OPERATOR, "devices", kernels)
    x, weight, fixed = operands("square", torch.float32)
    options = {**fixed, "channels_last": channels_last}
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x, weight, **options)
    assert y.dtype == torch.bfloat16
    expected = by_task(x.bfloat16(), weight.bfloat16(), **fixed)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert 1e-4 < relative_error(y, by_task(x, weight, **fixed)) < 1e-2
    dx, right = (torch.autograd.grad(Y.float().square().sum(), x)[0] for Y in (y, by_task(x, weight, **fixed)))
    assert dx.dtype == torch.float32
    assert 1e-4 < relative_error(dx, right) < 2e-2
    # torch leaves float64 alone under autocast.
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x.double(), weight.double(), **options)
    torch.testing.assert_close(y, by_task(x.double(), weight.double(), **fixed))


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@cases
def test_channels_last_is_the_same_convolution(case, backend):
    x, weight, fixed = operands(case)
    fixed = {**fixed, "backend": backend}
    cotangents = [torch.randn_like(X) for X in (conv2d(x, weight, **fixed), x, weight)]
    expected = derivatives(conv2d, x, weight, cotangents, fixed)
    actual = derivatives(conv2d, x, weight, cotangents, {**fixed, "channels_last": True})
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_channels_last_reaches_torch_in_that_format(monkeypatch):
    x, weight, fixed = operands("square")
    seen = []
    right = torch.nn.functional.conv2d

    def spy(x, weight, **options):
        seen.extend(X.is_contiguous(memory_format=torch.channels_last) for X in (x, weight))
        return right(x, weight, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    conv2d(x, weight, **fixed, backend="reference", channels_last=True)
    conv2d(x, weight, **fixed, backend="reference")
    assert seen == [True, True, False, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(1, 2, 4, 4)},
            ValueError,
            r"x: expected 5 dimensions \(tasks, .*\), got shape \(1, 2, 4, 4\)",
        ),
        ({"weight": torch.zeros(2, 3, 3, 3)}, ValueError, "weight: expected 5 dimensions"),
        ({"weight": [1]}, TypeError, "weight: expected a tensor, got list"),
        ({"weight": torch.zeros(1, 2, 4, 3, 3)}, ValueError, "weight: expected 3 in channels as x has, got 4"),
        ({"weight": torch.zeros(2, 2, 3, 3, 3)}, ValueError, "weight: expected 1 tasks as x has, got 2"),
        ({"x": torch.zeros(0, 2, 4, 4, 3)}, ValueError, "x: expected at least one task"),
        ({"x": torch.zeros(1, 2, 2, 4, 3)}, ValueError, "a kernel of 3 x 3 does not fit images of 2 x 4"),
        ({"stride": 0}, ValueError, "stride: expected an integer of at least 1, got 0"),
        ({"stride": (1, 1)}, ValueError, "stride: expected an integer"),
        ({"padding": -1}, ValueError, "padding: expected an integer of at least 0"),
        ({"weight": torch.zeros(1, 2, 3, 3, 3).double()}, TypeError, "weight: expected torch.float32 as x has"),
        ({"x": torch.zeros(1, 2, 4, 4, 3).long()}, TypeError, "x: expected a floating-point tensor"),
        (
            {"x": torch.zeros(1, 2, 4, 4, 3, device="meta")},
            ValueError,
            "weight: expected device meta as x has, got cpu",
        ),
        ({"backend": "fast"}, ValueError, "backend: expected one of auto, native, grouped, reference, got 'fast'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_names_itself(change, error, message):
    arguments = {"x": torch.zeros(1, 2, 4, 4, 3), "weight": torch.zeros(1, 2, 3, 3, 3), **change}
    with pytest.raises(error, match=message):
        conv2d(**arguments)


def test_the_operators_check_their_own_operands():
    x, weight, fixed = operands("square")
    dy, numbers = conv2d(x, weight, **fixed), tuple(fixed.values())
    ops = torch.ops.kfo_ext
    for call, message in (
        (lambda: ops.conv2d(x, weight[:, :, :4], *numbers), "conv2d: weight has 4 in channels, expected 5"),
        (lambda: ops.conv2d(x, weight.float(), *numbers), "conv2d: weight has float32, but x has float64"),
        (lambda: ops.conv2d_input(dy, weight, [9, 6], *numbers), "conv2d_input: dy has 4 rows, expected 5"),
        (lambda: ops.conv2d_input(dy, weight, [9], *numbers), "conv2d_input: size has 1 numbers"),
        (lambda: ops.conv2d_weight(x, dy[:1], [3, 3], *numbers), "conv2d_weight: dy has 1 tasks, expected 2"),
        (lambda: ops.conv2d_weight(x, dy, [9, 9], 1, 0), "conv2d_weight: a kernel of 9 x 9 does not fit"),
        (lambda: ops.grouped_conv2d(x, weight[:1], *numbers), "grouped_conv2d: .*one number of tasks, got 2 and 1"),
        (lambda: ops.grouped_conv2d_input(dy, weight, [9, 6], *numbers), r"dy has \[4, 3\] rows .* expected \[5, 3\]"),
        (lambda: ops.grouped_conv2d_weight(x, dy, [1, 9], *numbers), r"dy has \[4, 3\] rows .* expected \[5, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_raw_operators_refuse_what_they_have_no_rule_for():
    x, weight, fixed = operands("square")
    with pytest.raises(NotImplementedError, match=r"conv2d.*torch\.func"):
        torch.func.jvp(lambda a: torch.ops.kfo_ext.conv2d(a, weight, *fixed.values()), (x,), (x,))
