"""Batch norm + ReLU: every order and output against torch in float64, derivatives, strides, threads and messages."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from kfo_ext.functional import batch_norm_relu
from kfo_ext.ops.batch_norm import reference
from kfo_ext.ops.batch_norm.autograd import BATCH_NORM
from kfo_ext.testing import STRIDES, relative_error, with_strides

needs_native = pytest.mark.skipif(BATCH_NORM is None, reason="the compiled CPU library is not built")
EPS = 1e-5
EVERY = [True, True, True]
# (tasks, rows, channels), around the vectors, the blocks of rows and the channels of a job.
SIZES = [
    (1, 3, 1), (2, 7, 3), (3, 63, 4), (2, 64, 8), (2, 65, 15), (1, 129, 16), (2, 66, 17), (2, 50, 31), (5, 90, 32),
    (2, 40, 33), (9, 70, 64), (2, 30, 67), (1, 1000, 1),
]  # fmt: skip
OUTPUTS = ("y", "dx", "dweight", "dbias", "second_x", "second_weight", "second_dy")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
rows_param = pytest.mark.parametrize("shared", [False, True], ids=["per_task", "shared"])
relu_param = pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    ddx: Tensor
    ddweight: Tensor
    ddbias: Tensor


def draw(size, shared=False, dtype=torch.float64, mean=0.0) -> Operands:
    tasks, rows, channels = size
    parameters = (1 if shared else tasks, channels)
    shapes = [size, parameters, parameters, size, size, parameters, parameters]
    X = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    X[0] = 1.5 * X[0] + mean
    operands = Operands(*(value.to(dtype) for value in X))
    if rows < 2 or dtype == torch.float64:
        return operands
    # No z so near zero that float32 puts it on the other side of the ReLU's corner.
    near = pre_activation(operands).abs() < 1e-3 * (1 + abs(mean) / 10)
    return operands._replace(x=torch.where(near, operands.x + 0.25, operands.x))


def pre_activation(X: Operands) -> Tensor:
    return reference.batch_norm_relu(X.x.double(), X.weight.double(), X.bias.double(), EPS, False)


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """torch.nn.functional.batch_norm, a task at a time."""
    parts = []
    for t in range(len(x)):
        w, b = (P[t if len(P) > 1 else 0] for P in (weight, bias))
        parts.append(torch.nn.functional.batch_norm(x[t], None, None, w, b, training=True, eps=EPS))
    y = torch.stack(parts)
    return y.relu() if relu else y


def truth(X: Operands, relu: bool = True, missing: tuple[str, ...] = ()) -> dict[str, Tensor]:
    wide = Operands(*(value.detach().double().requires_grad_() for value in X))
    # torch refuses a batch of one value; its formula does not.
    plain = by_torch if X.x.shape[1] > 1 else lambda *P: reference.batch_norm_relu(*P[:3], EPS, P[3])
    y = plain(wide.x, wide.weight, wide.bias, relu)
    first = torch.autograd.grad(y, wide[:3], wide.dy, create_graph=True)
    pairs = zip(("ddx", "ddweight", "ddbias"), first)
    form = sum((getattr(wide, name) * d).sum() for name, d in pairs if name not in missing)
    second = torch.autograd.grad(form, (wide.x, wide.weight, wide.dy), allow_unused=True, materialize_grads=True)
    return {name: value.detach() for name, value in zip(OUTPUTS, (y, *first, *second))}


def run(X: Operands, relu: bool = True, missing: tuple[str, ...] = ()) -> dict[str, Tensor]:
    y, mean, rstd = BATCH_NORM.forward(X.x, X.weight, X.bias, EPS, relu)
    state = (X.x, X.weight, X.bias, mean, rstd, X.dy)
    dd = [None if name in missing else getattr(X, name) for name in ("ddx", "ddweight", "ddbias")]
    first = BATCH_NORM.backward(*state, relu, EVERY)
    return dict(zip(OUTPUTS, (y, *first, *BATCH_NORM.double_backward(*state, *dd, relu, EVERY))))


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    for name, value in expected.items():
        got = actual[name]
        assert got.shape == value.shape and got.is_contiguous(), name
        # What is zero up to rounding is compared absolutely.
        error = relative_error(got, value) if value.abs().max() > 1e-9 else got.abs().max().item()
        assert error <= (tolerance or TOLERANCE[got.dtype]), f"{name}: error {error:.2e}"


@needs_native
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@rows_param
@relu_param
def test_every_order_equals_torch_in_float64(size, shared, relu):
    X = draw(size, shared)
    # One row: rstd is eps^-1/2, and errors grow with its powers.
    check(run(X, relu), truth(X, relu), 1e-12 if size[1] > 1 else 1e-9)


@needs_native
@pytest.mark.parametrize("size", SIZES[1:], ids=lambda size: "x".join(map(str, size)))
@rows_param
def test_float32(size, shared):
    X = draw(size, shared, torch.float32)
    check(run(X), truth(X), 1e-4 if size[1] < 20 else None)


@needs_native
@pytest.mark.parametrize("mean", [0.0, 100.0, -1000.0])
def test_many_rows_and_far_means_in_float32(mean):
    X = draw((1, 100_000, 17), dtype=torch.float32, mean=mean)
    # The operands' own rounding of a mean so far off.
    check(run(X), truth(X), 1e-5 + 1e-6 * abs(mean))


@needs_native
def test_statistics_hold_where_a_shifted_sum_of_squares_fails():
    x = torch.randn(1, 5000, 16)
    x[:, :64] = 3e4
    _, mean, rstd = BATCH_NORM.forward(x, torch.ones(1, 16), torch.zeros(1, 16), EPS, True)
    wide = x.double()
    assert relative_error(mean, wide.mean(1)) < 1e-6
    assert relative_error(rstd, (wide.var(1, unbiased=False) + EPS).rsqrt()) < 1e-6


@needs_native
@pytest.mark.parametrize("present", range(8))
@rows_param
@relu_param
def test_missing_cotangents_are_zeros(present, shared, relu):
    names = ("ddx", "ddweight", "ddbias")
    missing = tuple(name for i, name in enumerate(names) if not present >> i & 1)
    X = draw((3, 21, 19), shared)
    zeros = X._replace(**{name: torch.zeros_like(getattr(X, name)) for name in missing})
    check(run(X, relu, missing), truth(zeros, relu))


@needs_native
@pytest.mark.parametrize("need", range(8))
@rows_param
def test_outputs_not_needed_are_empty_and_the_rest_unchanged(need, shared):
    X, flags = draw((3, 21, 19), shared), [bool(need >> i & 1) for i in range(3)]
    _, mean, rstd = BATCH_NORM.forward(*X[:3], EPS, True)
    state = (*X[:3], mean, rstd, X.dy)
    for op, rest in ((BATCH_NORM.backward, ()), (BATCH_NORM.double_backward, X[4:])):
        every = op(*state, *rest, True, EVERY)
        for wanted, out, full in zip(flags, op(*state, *rest, True, flags), every):
            assert torch.equal(out, full) if wanted else out.shape == (0,)


def strided(X: Tensor, kind: str) -> Tensor:
    return with_strides(X.reshape(len(X), -1), kind).unflatten(1, X.shape[1:])


@needs_native
@pytest.mark.parametrize("kind", [*STRIDES, "channels_first"])
@pytest.mark.parametrize("name", Operands._fields)
def test_any_strides_on_any_operand(kind, name):
    X = draw((3, 21, 19))
    value = getattr(X, name)
    other = value.mT.contiguous().mT if kind == "channels_first" else strided(value, kind)
    X = X._replace(**{name: other})
    dense = Operands(*(value.contiguous() for value in X))
    for label, out in run(X).items():
        assert torch.equal(out, run(dense)[label]), label


@needs_native
def test_any_strides_on_the_statistics():
    X = draw((3, 21, 19))
    _, mean, rstd = BATCH_NORM.forward(*X[:3], EPS, True)
    for change in (lambda S: S.T.contiguous().T, lambda S: torch.stack([S, S + 1], -1)[..., 0]):
        got = BATCH_NORM.backward(*X[:3], change(mean), change(rstd), X.dy, True, EVERY)
        for a, b in zip(got, BATCH_NORM.backward(*X[:3], mean, rstd, X.dy, True, EVERY)):
            assert torch.equal(a, b)


@needs_native
@rows_param
def test_no_tasks(shared):
    X = draw((0, 5, 3), shared)
    out = run(X)
    assert out["y"].shape == out["dx"].shape == out["second_dy"].shape == (0, 5, 3)
    for name in ("dweight", "dbias", "second_weight"):
        assert out[name].shape == X.weight.shape and not out[name].any()


@needs_native
def test_a_constant_channel():
    X = draw((2, 9, 4))
    x = X.x.clone()
    x[..., 1] = 3.0
    check(run(X._replace(x=x)), truth(X._replace(x=x)), 1e-9)


@needs_native
def test_not_a_number_stays_in_its_task():
    X = draw((3, 70, 19), dtype=torch.float32)
    clean, x = run(X), X.x.clone()
    x[1, 5, 2] = float("nan")
    expected = truth(X._replace(x=x))
    assert expected["y"][1, :, 2].isnan().all()
    for name, out in run(X._replace(x=x)).items():
        assert torch.equal(out.isnan(), expected[name].isnan()), name
        for t in (0, 2):
            assert torch.equal(out[t], clean[name][t]), name


@needs_native
@rows_param
def test_bit_equal_at_any_number_of_threads(shared):
    X = draw((5, 300, 67), shared, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(X))
    for other in results[1:]:
        assert all(torch.equal(out, other[name]) for name, out in results[0].items())


@needs_native
def test_channels_and_tasks_do_not_depend_on_their_neighbours():
    X = draw((9, 100, 40), dtype=torch.float32)
    alone = Operands(*(value[3:4, ..., 33:35].contiguous() for value in X))
    for name, out in run(alone).items():
        assert torch.equal(out, run(X)[name][3:4, ..., 33:35]), name


def leaves(shared=False, size=(2, 5, 3)):
    return [value.requires_grad_() for value in draw(size, shared)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@rows_param
@relu_param
def test_gradcheck_and_gradgradcheck(shared, relu, backend):
    def public(*P):
        return batch_norm_relu(*P, eps=1e-2, relu=relu, backend=backend)

    X = leaves(shared)[:3]
    assert gradcheck(public, X)
    assert gradgradcheck(public, X)


@needs_native
@rows_param
@relu_param
def test_gradcheck_of_the_operators(shared, relu):
    """mean and rstd as functions of x: as operands of their own they have no derivative."""

    def statistics(x, weight, bias):
        with torch.no_grad():
            return BATCH_NORM.forward(x, weight, bias, 1e-2, relu)[1:]

    def backward(x, weight, bias, dy):
        return BATCH_NORM.backward(x, weight, bias, *statistics(x, weight, bias), dy, relu, EVERY)

    def double_backward(x, weight, bias, dy, *dd):
        return BATCH_NORM.double_backward(x, weight, bias, *statistics(x, weight, bias), dy, *dd, relu, EVERY)

    X = leaves(shared)
    assert gradcheck(backward, X[:4])
    assert gradgradcheck(backward, X[:4])
    assert gradcheck(double_backward, X)
    # The fast mode needs a graph of every gradient; that by the bias is zero and has none.
    assert gradgradcheck(double_backward, (*X[:2], X[2].detach(), *X[3:]), fast_mode=True)


@needs_native
@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_subset_of_operands(wanted):
    X = leaves()[:3]
    for i, value in enumerate(X):
        value.requires_grad_(bool(wanted >> i & 1))
    assert gradcheck(batch_norm_relu, X)
    assert gradgradcheck(batch_norm_relu, X)


def scalar(y: Tensor, kind: str) -> Tensor:
    """A scalar of y whose cotangents have other strides than the kernels write."""
    if kind == "expanded":
        return y.sum() ** 2 + (y.sum(1) ** 3).sum()
    if kind == "transposed":
        return (torch.cat([y.mT.flip(1), y.mT], 1) ** 3).sum()
    if kind == "sliced":
        return (y[:, ::2] ** 3).sum() + (y[1:, 1:] ** 2).sum()
    return (y.tanh() ** 2).sum()


@needs_native
@rows_param
@relu_param
@pytest.mark.parametrize("kind", ["plain", "expanded", "transposed", "sliced"])
def test_orders_one_to_four_equal_plain_torch(kind, shared, relu):
    """The plain formula, which gradcheck has: torch's own batch norm is wrong from the third derivative on (2.13)."""
    results = []
    operands = draw((3, 7, 5), shared)[:3]
    for function in (lambda *P: batch_norm_relu(*P, relu=relu), lambda *P: reference.batch_norm_relu(*P, EPS, relu)):
        X = [value.clone().requires_grad_() for value in operands]
        value = scalar(function(*X), kind)
        weights = torch.Generator().manual_seed(5)
        orders = []
        for _ in range(4):
            grads = torch.autograd.grad(value, X, create_graph=True, allow_unused=True, materialize_grads=True)
            orders.append([grad.detach() for grad in grads])
            value = sum((g * torch.randn(g.shape, generator=weights, dtype=g.dtype)).sum() for g in grads)
        results.append(orders)
    for order, (actual, expected) in enumerate(zip(*results), start=1):
        for a, b in zip(actual, expected):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp_min(1), f"order {order}"


@needs_native
def test_a_third_derivative_equals_differences_of_the_second():
    operands = draw((3, 7, 5))
    X, directions, step = operands[:3], [torch.randn_like(value) for value in operands[:3]], 1e-6

    def second(*P):
        first = torch.autograd.grad((batch_norm_relu(*P).tanh() ** 2).sum(), P, create_graph=True)
        form = sum((d * other).sum() for d, other in zip(first, operands[4:]))
        return sum((d * other).sum() for d, other in zip(torch.autograd.grad(form, P, create_graph=True), operands[:3]))

    def at(distance):
        return second(*((value + distance * D).requires_grad_() for value, D in zip(X, directions))).item()

    P = [value.clone().requires_grad_() for value in X]
    third = sum((d * D).sum() for d, D in zip(torch.autograd.grad(second(*P), P), directions)).item()
    assert third == pytest.approx((at(step) - at(-step)) / (2 * step), rel=1e-6)


@needs_native
def test_a_third_derivative_without_a_graph_of_its_own():
    """The last order of a training step: nothing is to be differentiated again."""
    results = []
    operands = draw((2, 7, 5))
    for function in (batch_norm_relu, lambda *P: reference.batch_norm_relu(*P, EPS)):
        X = [value.clone().requires_grad_() for value in operands[:3]]
        dx = torch.autograd.grad((function(*X) ** 3).sum(), X[0], create_graph=True)[0]
        ddx = torch.autograd.grad((dx**2).sum(), X[0], create_graph=True)[0]
        (ddx * operands.ddx).sum().backward()
        results.append([value.grad for value in X])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@rows_param
def test_opcheck(shared, layout):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    X = draw((2, 5, 3), shared)
    if layout == "transposed":
        X = [value.mT.contiguous().mT for value in X]
    x, weight, bias, dy, *dd = (value.requires_grad_() for value in X)
    _, mean, rstd = (value.detach() for value in BATCH_NORM.forward(x, weight, bias, EPS, True))
    state = (x, weight, bias, mean, rstd, dy)
    torch.library.opcheck(BATCH_NORM.forward, (x, weight, bias, EPS, True))
    torch.library.opcheck(BATCH_NORM.forward, (x, weight, bias, EPS, False))
    torch.library.opcheck(BATCH_NORM.backward, (*state, True, EVERY))
    torch.library.opcheck(BATCH_NORM.backward, (*state, False, [False, True, False]))
    torch.library.opcheck(BATCH_NORM.double_backward, (*state, *dd, True, EVERY))
    torch.library.opcheck(BATCH_NORM.double_backward, (*state, None, dd[1], None, True, [True, False, True]))


def test_forward_mode_equals_plain_torch():
    X = draw((2, 5, 3))[:3]
    tangents = []
    for function in (batch_norm_relu, lambda *P: reference.batch_norm_relu(*P, EPS)):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(value, value.cos()) for value in X]
            tangents.append(forward_ad.unpack_dual(function(*duals)).tangent)
    torch.testing.assert_close(*tangents)


@needs_native
def test_raw_operators_raise_where_they_have_no_rule():
    X = draw((2, 5, 3))
    raw = lambda *P: BATCH_NORM.forward(*P, EPS, True)[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"torch\.func.*kfo_ext\.functional\.batch_norm_relu"):
        torch.func.jvp(raw, tuple(X[:3]), tuple(X[:3]))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        raw(forward_ad.make_dual(X.x, X.x), *X[1:3])
    _, mean, rstd = BATCH_NORM.forward(*X[:3], EPS, True)
    with pytest.raises(NotImplementedError, match="mean, rstd: expected tensors without requires_grad"):
        BATCH_NORM.backward(*X[:3], mean, rstd.requires_grad_(), X.dy, True, EVERY)


def test_compile_forward_and_backward():
    torch.compiler.reset()
    step = torch.compile(lambda *P: (batch_norm_relu(*P) ** 3).sum(), backend="aot_eager", fullgraph=True, dynamic=True)
    for tasks in (2, 3):
        operands, grads = draw((tasks, 5, 4))[:3], []
        for function in (step, lambda *P: (reference.batch_norm_relu(*P, EPS) ** 3).sum()):
            X = [value.clone().requires_grad_() for value in operands]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grads.append(torch.autograd.grad(function(*X), X))
        torch.testing.assert_close(*grads)


def test_autocast_computes_in_float32():
    x, weight, bias = (value.float().requires_grad_() for value in draw((2, 9, 5))[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = batch_norm_relu(x.bfloat16(), weight, bias)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference.batch_norm_relu(x.bfloat16().float(), weight, bias, EPS))
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_converted_around_the_operator(dtype):
    X = [value.to(dtype).requires_grad_() for value in draw((2, 9, 5))[:3]]
    y = batch_norm_relu(*X)
    assert y.dtype == dtype
    assert torch.equal(y, batch_norm_relu(*(value.float() for value in X)).to(dtype))
    assert torch.autograd.grad(y.float().sum(), X[1])[0].dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda X: X[0]}, ValueError, r"x: expected 3 dimensions \(tasks, rows, channels\), got shape \(5, 4\)"),
        ({"x": lambda X: X[:, :0]}, ValueError, r"x: expected at least 2 rows, got shape \(3, 0, 4\)"),
        ({"x": lambda X: X.tolist()}, TypeError, "x: expected a tensor, got list"),
        ({"x": lambda X: X.long()}, TypeError, "x: expected a floating-point tensor, got torch.int64"),
        ({"weight": lambda X: X[:, :3]}, ValueError, r"weight: expected shape \(3 or 1, 4\) .*, got \(3, 3\)"),
        ({"weight": lambda X: X[:2]}, ValueError, r"weight: expected shape \(3 or 1, 4\) .*, got \(2, 4\)"),
        ({"bias": lambda X: X[0]}, ValueError, r"bias: expected shape \(3 or 1, 4\) .*, got \(4,\)"),
        ({"bias": lambda X: X.float()}, TypeError, "bias: expected torch.float64 as x has, got torch.float32"),
        ({"bias": lambda X: X.to("meta")}, ValueError, "bias: expected device cpu as x has, got meta"),
        ({"eps": lambda _: 0.0}, ValueError, "eps: expected a positive number, got 0.0"),
        ({"eps": lambda _: "1"}, TypeError, "eps: expected a number, got str"),
        ({"relu": lambda _: 1}, TypeError, "relu: expected a bool, got int"),
        ({"backend": lambda _: "triton"}, ValueError, "backend: expected one of auto, native, reference, got 'triton'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_operands(change, error, message, backend):
    X = draw((3, 5, 4))
    arguments = {"x": X.x, "weight": X.weight, "bias": X.bias, "eps": EPS, "relu": True, "backend": backend}
    arguments.update({name: make(arguments[name]) for name, make in change.items()})
    with pytest.raises(error, match=message):
        batch_norm_relu(**arguments)


def test_a_backend_that_does_not_run_raises():
    X = [value.to("meta") for value in draw((3, 5, 4))[:3]]
    with pytest.raises(RuntimeError, match="backend 'native' does not run on meta"):
        batch_norm_relu(*X, backend="native")
    assert batch_norm_relu(*X).shape == (3, 5, 4)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda X: X[0]}, r"x has 2 dimensions, expected 3: \(tasks, rows, channels\)"),
        ({"x": lambda X: X.half()}, "x has another dtype, expected float32 or float64"),
        ({"x": lambda X: X[:, :0]}, "x has 0 rows, expected at least 2"),
        ({"weight": lambda X: X[:2]}, "weight has 2 rows, but x has 3 tasks: expected 1 or that many"),
        ({"bias": lambda X: X[:, :3]}, "bias has 3 channels, but x has 4"),
        ({"bias": lambda X: X.float()}, "bias has float32, but x has float64: expected one dtype"),
        ({"mean": lambda X: X[:1]}, "mean has 1 rows, but x has 3"),
        ({"rstd": lambda X: X[0]}, r"rstd has 1 dimensions, expected 2: \(tasks, channels\)"),
        ({"dy": lambda X: X[:, :4]}, r"dy has shape \(3, 4, 4\), but x has \(3, 5, 4\)"),
        ({"ddx": lambda X: X[:2]}, r"ddx has shape \(2, 5, 4\), but x has \(3, 5, 4\)"),
        ({"ddweight": lambda X: X[:1]}, "ddweight has 1 rows, but weight has 3"),
        ({"ddbias": lambda X: X[:1]}, "ddbias has 1 rows, but bias has 3"),
        ({"need": lambda _: [True]}, "need has 1 flags, expected 3"),
    ],
)
def test_operators_check_their_operands(change, message):
    X = draw((3, 5, 4))
    operands = {"x": X.x, "weight": X.weight, "bias": X.bias, "mean": X.weight, "rstd": X.bias, "dy": X.dy}
    operands |= {"ddx": X.ddx, "ddweight": X.ddweight, "ddbias": X.ddbias, "relu": True, "need": EVERY}
    operands.update({name: make(operands[name]) for name, make in change.items()})
    with pytest.raises(ValueError, match=f"^batch_norm_relu_double_backward: {message}"):
        BATCH_NORM.double_backward(*operands.values())
    first = {name: value for name, value in operands.items() if not name.startswith("dd")}
    if not next(iter(change)).startswith("dd"):
        with pytest.raises(ValueError, match=f"^batch_norm_relu_backward: {message}"):
            BATCH_NORM.backward(*first.values())
    if next(iter(change)) in ("x", "weight", "bias"):
        with pytest.raises(ValueError, match=f"^batch_norm_relu: {message}"):
            BATCH_NORM.forward(first["x"], first["weight"], first["bias"], EPS, True)
    with pytest.raises(ValueError, match=r"^batch_norm_relu: eps is 0\.0+, expected a positive number"):
        BATCH_NORM.forward(*X[:3], 0.0, True)
