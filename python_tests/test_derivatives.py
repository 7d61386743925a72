"""Derivatives of the operators and of `transform`: gradcheck, orders to 4, opcheck, torch.func, compile, autocast."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from kfo_ext.functional import transform
from kfo_ext.ops.transform import reference
from kfo_ext.ops.transform.op import NATIVE
from kfo_ext.problems import Problems
from kfo_ext.testing import CASES, random_operands

SHAPES = [(3, 2, 3), (1, 2, 1), (1, 2, 3)]
PROBLEMS = Problems(SHAPES)
FLAT = PROBLEMS.flat
ROWS = {"per_task": (2, 2), "shared": (1, 1)}

needs_native = pytest.mark.skipif(NATIVE is None, reason="the compiled CPU library is not built")
rows_param = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def leaves(rows=(2, 2), tasks=2, shapes=SHAPES):
    return [X.requires_grad_() for X in random_operands(shapes, tasks, rows=rows)]


def public(R, G, L, bias=None):
    return transform(R, G, L, PROBLEMS, bias=bias)


def plain(R, G, L, bias=None):
    return reference.transform(R, G, L, FLAT, bias)


@needs_native
@rows_param
def test_gradcheck_and_gradgradcheck(rows):
    R, G, L, dY, ddR, ddG, ddL, bias = leaves(rows)
    every = [True, True, True]
    assert gradcheck(public, (R, G, L, bias))
    assert gradgradcheck(public, (R, G, L, bias))
    backward = lambda R, G, L, dY: NATIVE.backward(R, G, L, dY, FLAT, every)  # noqa: E731
    assert gradcheck(backward, (R, G, L, dY))
    assert gradgradcheck(backward, (R, G, L, dY))
    double = lambda *X: NATIVE.double_backward(*X, FLAT, [*every, True])  # noqa: E731
    assert gradcheck(double, (R, G, L, dY, ddR, ddG, ddL))
    assert gradgradcheck(double, (R, G, L, dY, ddR, ddG, ddL), fast_mode=True)


@needs_native
@pytest.mark.parametrize("wanted", range(1, 8))
def test_each_subset_of_operands(wanted):
    R, G, L, *_ = leaves()
    for i, X in enumerate((R, G, L)):
        X.requires_grad_(bool(wanted >> i & 1))
    assert gradcheck(public, (R, G, L))
    assert gradgradcheck(public, (R, G, L))


def scalar(function, X, kind):
    """A scalar of the outputs whose cotangents have other strides than the kernels write."""
    Y = function(*X)
    if kind == "expanded":
        return Y.sum() ** 2 + (Y.sum(0) ** 3).sum()
    if kind == "transposed":
        return (torch.cat([Y.T.flip(1), Y.T], 1) ** 3).sum()
    if kind == "sliced":
        return (Y[:, ::2] ** 3).sum() + (Y[1:, 1:] ** 2).sum()
    return (Y.tanh() ** 2).sum()


@needs_native
@rows_param
@pytest.mark.parametrize("kind", ["plain", "expanded", "transposed", "sliced"])
def test_orders_one_to_four_equal_the_reference(kind, rows):
    results = []
    for function in (public, plain):
        R, G, L, *_, bias = leaves(rows)
        X = (R, G, L, bias)
        value = scalar(function, X, kind)
        weights = torch.Generator().manual_seed(5)
        orders = []
        for _ in range(4):
            grads = torch.autograd.grad(value, X, create_graph=True)
            orders.append([grad.detach() for grad in grads])
            value = sum((grad * torch.randn(grad.shape, generator=weights, dtype=grad.dtype)).sum() for grad in grads)
        results.append(orders)
    for order, (actual, expected) in enumerate(zip(*results), start=1):
        for a, b in zip(actual, expected):
            error = (a - b).abs().max() / b.abs().max()
            assert error < 1e-11, f"order {order}: relative error {error:.2e}"


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@rows_param
def test_opcheck(rows, layout):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    X = random_operands(SHAPES, 2, rows=rows)
    if layout == "transposed":
        X = [operand.T.contiguous().T for operand in X]
    R, G, L, dY, ddR, ddG, ddL, bias = (operand.requires_grad_() for operand in X)
    need = [True, True, True]
    torch.library.opcheck(NATIVE.transform, (R, G, L, FLAT))
    torch.library.opcheck(NATIVE.transform, (R, G, L, FLAT, bias))
    torch.library.opcheck(NATIVE.backward, (R, G, L, dY, FLAT, need))
    torch.library.opcheck(NATIVE.backward, (R, G, L, dY, FLAT, [True, False, True]))
    torch.library.opcheck(NATIVE.double_backward, (R, G, L, dY, ddR, ddG, ddL, FLAT, [*need, True]))
    torch.library.opcheck(NATIVE.double_backward, (R, G, L, dY, None, ddG, None, FLAT, [True, False, True, True]))


# The table of FACTS on torch.func and compile: each program gives what it gives with plain torch, or raises.


def quadratic(function):
    return lambda R, G, L: (function(R, G, L) ** 2).sum()


FUNC_PROGRAMS = {
    "grad": lambda f: torch.func.grad(quadratic(f), argnums=(0, 1, 2)),
    "nested grad": lambda f: torch.func.grad(
        lambda *X: sum((g**2).sum() for g in torch.func.grad(quadratic(f), argnums=(0, 1, 2))(*X)), argnums=(0, 1, 2)
    ),
    "vmap": lambda f: lambda R, G, L: torch.vmap(lambda g: f(R, g, L))(torch.stack([G, 2 * G])),
    "vmap(grad)": lambda f: (
        lambda R, G, L: torch.vmap(lambda g: torch.func.grad(quadratic(f))(R, g, L))(torch.stack([G, 2 * G]))
    ),
    "jvp": lambda f: lambda R, G, L: torch.func.jvp(f, (R, G, L), (R.cos(), G.cos(), L.cos()))[1],
    "vjp": lambda f: lambda R, G, L: torch.func.vjp(f, R, G, L)[1](G.cos()),
    "hessian": lambda f: lambda R, G, L: torch.func.hessian(lambda r: quadratic(f)(r, G, L))(R),
    "jacrev": lambda f: torch.func.jacrev(f),
    "linearize": lambda f: lambda R, G, L: torch.func.linearize(f, R, G, L)[1](R.cos(), G.cos(), L.cos()),
}


@pytest.mark.parametrize("program", FUNC_PROGRAMS)
@rows_param
def test_torch_func_equals_plain_torch(program, rows):
    X = random_operands(SHAPES, 2, rows=rows)[:3]
    torch.testing.assert_close(FUNC_PROGRAMS[program](public)(*X), FUNC_PROGRAMS[program](plain)(*X))


def test_forward_mode_equals_plain_torch():
    X = random_operands(SHAPES, 2)[:3]
    tangents = []
    for function in (public, plain):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(operand, operand.cos()) for operand in X]
            tangents.append(forward_ad.unpack_dual(function(*duals)).tangent)
    torch.testing.assert_close(*tangents)


def test_batched_gradients_equal_plain_torch():
    cotangents = torch.randn(3, 2, PROBLEMS.packing.numel, dtype=torch.float64)
    grads = []
    for function in (public, plain):
        X = leaves()[:3]
        grads.append(torch.autograd.grad(function(*X), X, cotangents, is_grads_batched=True))
    torch.testing.assert_close(*grads)


@needs_native
def test_raw_operators_raise_where_they_have_no_rule():
    X = random_operands(SHAPES, 2)[:3]
    raw = lambda *X: NATIVE.transform(*X, FLAT)  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func transforms other than grad"):
        torch.func.jvp(raw, X, X)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        raw(forward_ad.make_dual(X[0], X[0]), *X[1:])


@needs_native
def test_an_absent_cotangent_has_no_tangent():
    R, G, L, dY, ddR, _, _, _ = random_operands(SHAPES, 2)
    call = lambda R: NATIVE.double_backward(R, G, L, dY, ddR, None, None, FLAT, [True] * 4)  # noqa: E731
    with forward_ad.dual_level():
        torch.testing.assert_close(call(R), call(R.clone()))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(forward_ad.make_dual(R, R))


@needs_native
def test_what_a_finished_transform_leaves_behind_is_differentiated():
    """A tensor that outlives its torch.func transform is wrapped still: it is what it wraps."""
    R, G, L = leaves()[:3]
    kept = []
    torch.func.grad(lambda X: (kept.append(X), X.sum())[1])(G.detach())
    Y = NATIVE.transform(R, kept[0], L, FLAT)
    assert torch.equal(Y, NATIVE.transform(R, G, L, FLAT))
    for actual, expected in zip(
        torch.autograd.grad(Y.sum(), (R, L)), torch.autograd.grad(plain(R, G, L).sum(), (R, L))
    ):
        torch.testing.assert_close(actual, expected)


@needs_native
@pytest.mark.parametrize("need", [(True, True, True), (True, False, True), (False, False, False)], ids=str)
def test_outputs_require_gradients_where_they_are_needed(need):
    R, G, L, dY, ddR, ddG, ddL, _ = leaves()
    first = NATIVE.backward(R, G, L, dY, FLAT, need)
    assert tuple(output.requires_grad for output in first) == need
    second = NATIVE.double_backward(R, G, L, dY, ddR, ddG, ddL, FLAT, [*need, False])
    assert tuple(output.requires_grad for output in second) == (*need, False)
    with torch.no_grad():
        assert not any(output.requires_grad for output in NATIVE.backward(R, G, L, dY, FLAT, need))


COMPILED = {"aot_eager": {}, "inductor": {}}


@pytest.mark.parametrize("backend", COMPILED)
def test_compile_forward_and_backward(backend):
    torch.compiler.reset()
    step = torch.compile(
        lambda R, G, L: (public(R, G, L).tanh() ** 2).sum(), backend=backend, fullgraph=True, dynamic=True
    )
    for tasks in (2, 3):
        grads = []
        for function in (step, lambda *X: (plain(*X).tanh() ** 2).sum()):
            X = leaves((1, tasks), tasks)[:3]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grads.append(torch.autograd.grad(function(*X), X))
        torch.testing.assert_close(*grads)


def test_compiled_functional_gradients_equal_plain_torch():
    torch.compiler.reset()
    X = random_operands(SHAPES, 2)[:3]
    for program in ("grad", "nested grad", "vmap(grad)"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = torch.compile(FUNC_PROGRAMS[program](public), backend="aot_eager")(*X)
        torch.testing.assert_close(actual, FUNC_PROGRAMS[program](plain)(*X))


def test_double_backward_through_a_compiled_region_raises():
    torch.compiler.reset()
    R, G, L = leaves()[:3]
    Y = torch.compile(public, backend="aot_eager")(R, G, L)
    with pytest.raises(RuntimeError):
        grads = torch.autograd.grad((Y**2).sum(), (R, G, L), create_graph=True)
        torch.autograd.grad(sum((grad**2).sum() for grad in grads), R)


@needs_native
def test_export_keeps_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, R, G, L):
            return public(R, G, L)

    X = random_operands(SHAPES, 2)[:3]
    program = torch.export.export(Layer(), X)
    assert any(node.target is NATIVE.transform for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*X), plain(*X))


def test_autocast_computes_in_float32():
    R, G, L, *_, bias = (X.float().requires_grad_() for X in random_operands(SHAPES, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Y = public(R, G.bfloat16(), L, bias)
    assert Y.dtype == torch.float32
    torch.testing.assert_close(Y, plain(R, G.bfloat16().float(), L, bias))
    assert torch.autograd.grad(Y.sum(), R)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_leaves_float32_as_it_is(backend):
    R, G, L, *_, bias = (X.float() for X in random_operands(SHAPES, 2))
    expected = transform(R, G, L, PROBLEMS, bias=bias, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(R, G, L, PROBLEMS, bias=bias, backend=backend), expected)


@needs_native
def test_raw_operators_under_autocast():
    R, G, L = random_operands(SHAPES, 2)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert NATIVE.transform(R.bfloat16(), G.bfloat16(), L.bfloat16(), FLAT).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_converted_around_the_operator(dtype):
    R, G, L = (X.to(dtype).requires_grad_() for X in random_operands(SHAPES, 2)[:3])
    Y = public(R, G, L)
    assert Y.dtype == dtype
    wide = plain(R.float(), G.float(), L.float())
    assert torch.equal(Y, wide.to(dtype))
    assert torch.autograd.grad(Y.float().sum(), G)[0].dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"R": lambda X: X.float()}, TypeError, "R: expected torch.float64 as G has, got torch.float32"),
        ({"L": lambda X: X.to(torch.int64)}, TypeError, "L: expected a floating-point tensor"),
        (
            {"L": lambda X: X.to(torch.float8_e5m2)},
            TypeError,
            "L: expected float32, float64, float16 or bfloat16, got torch.float8",
        ),
        ({"bias": lambda X: X.half()}, TypeError, "bias: expected torch.float64 as G has, got torch.float16"),
        ({"bias": lambda X: X[0]}, ValueError, "bias: expected 2 dimensions"),
        ({"G": lambda X: X.tolist()}, TypeError, "G: expected a tensor, got list"),
        ({"R": lambda X: X.tolist()}, TypeError, "R: expected a tensor, got list"),
        ({"R": lambda X: X.to("meta")}, ValueError, "R: expected device cpu"),
        ({"G": lambda X: X[0]}, ValueError, "G: expected 2 dimensions"),
        ({"L": lambda X: X[:, :-1]}, ValueError, r"transform: L has 48 columns, but shapes \[\(1, 5, 7\)\] need 49"),
        ({"G": lambda X: X[:, :-1]}, ValueError, r"transform: G has 34 columns, but shapes \[\(1, 5, 7\)\] need 35"),
        ({"bias": lambda X: X[:, :-1]}, ValueError, "transform: bias has 34 columns"),
        ({"R": lambda X: torch.cat([X, X])}, ValueError, "transform: R has 6 rows, but G has 3 tasks"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_operands(change, error, message, backend):
    operands = random_operands(CASES["linear"], 3)._asdict()
    operands.update({name: make(operands[name]) for name, make in change.items()})
    with pytest.raises(error, match=message):
        transform(
            operands["R"],
            operands["G"],
            operands["L"],
            Problems(CASES["linear"]),
            bias=operands["bias"],
            backend=backend,
        )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_tasks(backend):
    for rows in ((1, 1), (0, 0)):
        R, G, L = (X.requires_grad_() for X in random_operands(SHAPES, 0, rows=rows)[:3])
        Y = transform(R, G, L, PROBLEMS, backend=backend)
        assert Y.shape == (0, PROBLEMS.packing.numel)
        assert not torch.autograd.grad(Y.sum(), R)[0].any()


def test_bad_problems():
    R, G, L = random_operands(SHAPES, 2)[:3]
    with pytest.raises(TypeError, match="problems: expected Problems, got list"):
        transform(R, G, L, SHAPES)
    with pytest.raises(ValueError, match=r"shapes\[1\]: expected B, p and q of at least 1, got \(2, 0, 4\)"):
        Problems([(1, 1, 1), (2, 0, 4)])
    with pytest.raises(TypeError, match=r"shapes\[0\]: expected three integers"):
        Problems([(1, 2.5, 3)])
    with torch.autocast("cpu"), pytest.raises(TypeError, match="R: expected a tensor, got NoneType"):
        transform(None, G, L, PROBLEMS)


def test_bad_backend():
    operands = random_operands(CASES["linear"], 3)
    with pytest.raises(ValueError, match="backend: expected one of auto, native, triton, reference, got 'cudnn'"):
        transform(operands.R, operands.G, operands.L, Problems(CASES["linear"]), backend="cudnn")
    with pytest.raises(RuntimeError, match="backend 'native' does not run on meta"):
        meta = [X.to("meta") for X in operands[:3]]
        transform(*meta, Problems(CASES["linear"]), backend="native")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_row_major_kronecker_identity(backend):
    """vec(R^T G L) = kron(R^T, L^T) vec(G), for random factors that are not symmetric and p != q."""
    if backend == "native" and NATIVE is None:
        pytest.skip("the compiled CPU library is not built")
    R, G, L, *_ = random_operands([(1, 3, 5)], 1)
    Y = transform(R, G, L, Problems([(1, 3, 5)]), backend=backend)
    torch.testing.assert_close(Y[0], torch.kron(R.view(3, 3).T.contiguous(), L.view(5, 5).T.contiguous()) @ G[0])
