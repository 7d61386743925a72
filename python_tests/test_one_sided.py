"""Groups in which some problems lack a factor, against dense identities, in plain torch and float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfo_ext import KFO, Problems
from kfo_ext.functional import adjoint, transform
from kfo_ext.ops import parts
from kfo_ext.ops.parts import Parts
from kfo_ext.ops.transform.op import NATIVE

BACKENDS = ["reference", *(["native"] if NATIVE else [])]
GROUPS = {
    "all kinds": ([(3, 2, 3), (1, 2, 4), (4, 3, 2), (1, 5, 1), (2, 3, 5)], ["RL", "R", "L", "RL", "R"]),
    "runs": ([(1, 2, 3), (2, 1, 3), (1, 3, 1), (1, 4, 2)], ["L", "RL", "RL", "L"]),
    "no R": ([(1, 4, 2), (2, 3, 2)], ["L", "L"]),
    "no L": ([(2, 3, 2), (1, 1, 3)], ["R", "R"]),
}
ORDERS = {"transform": transform, "adjoint": adjoint}
groups = pytest.mark.parametrize(("shapes", "sides"), GROUPS.values(), ids=GROUPS)
backends = pytest.mark.parametrize("backend", BACKENDS)
functions = pytest.mark.parametrize("name", ORDERS)


def operands(shapes, sides, tasks=2, rows=(2, 2)):
    problems = Problems(shapes, sides=sides)
    sizes = (problems.R.numel, problems.packing.numel, problems.L.numel)
    R, G, L = (torch.randn(n, size, dtype=torch.float64) for n, size in zip((rows[0], tasks, rows[1]), sizes))
    return problems, [R, G, L]


def dense(name, shapes, sides, R, G, L):
    """Matrix by matrix, with an identity for each absent factor: nothing of the package."""
    out, at_R, at_G, at_L = [], 0, 0, 0
    for (B, p, q), side in zip(shapes, sides):
        R_i, L_i = torch.eye(p, dtype=R.dtype)[None, None], torch.eye(q, dtype=L.dtype)[None, None]
        if "R" in side:
            R_i, at_R = R[:, at_R : at_R + p * p].reshape(len(R), 1, p, p), at_R + p * p
        if "L" in side:
            L_i, at_L = L[:, at_L : at_L + q * q].reshape(len(L), 1, q, q), at_L + q * q
        G_i, at_G = G[:, at_G : at_G + B * p * q].reshape(len(G), B, p, q), at_G + B * p * q
        out.append((R_i.mT @ G_i @ L_i if name == "transform" else R_i @ G_i @ L_i.mT).flatten(1))
    return torch.cat(out, 1)


def three_orders(function, given):
    """The value, and the first and second derivatives by every operand that has elements."""
    leaves = [X.detach().clone().requires_grad_(X.numel() > 0) for X in given]
    wanted = [X for X in leaves if X.requires_grad]
    generator = torch.Generator().manual_seed(5)

    def weighted(X):
        return (torch.randn(X.shape, generator=generator, dtype=torch.float64) * X * X).sum()

    value = function(*leaves)
    first = torch.autograd.grad(weighted(value), wanted, create_graph=True)
    second = torch.autograd.grad(sum(weighted(X) for X in first), wanted)
    return [value, *first, *second]


@functions
@backends
@groups
@pytest.mark.parametrize("rows", [(2, 2), (1, 1), (1, 2)], ids=str)
def test_three_orders_equal_dense_identities(shapes, sides, rows, backend, name):
    problems, given = operands(shapes, sides, rows=rows)
    ours = three_orders(lambda R, G, L: ORDERS[name](R, G, L, problems, backend=backend), given)
    truth = three_orders(lambda R, G, L: dense(name, shapes, sides, R, G, L), given)
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@backends
def test_the_bias_is_added_to_every_matrix(backend):
    shapes, sides = GROUPS["all kinds"]
    problems, (R, G, L) = operands(shapes, sides)
    for rows in (1, 2):
        bias = torch.randn(rows, problems.bias.numel, dtype=torch.float64)
        terms = [b.repeat(1, B) for (B, _, _), b in zip(shapes, bias.split([p * q for _, p, q in shapes], 1))]
        expected = dense("transform", shapes, sides, R, G, L) + torch.cat(terms, 1)
        torch.testing.assert_close(transform(R, G, L, problems, bias=bias, backend=backend), expected)


@functions
def test_gradgradcheck_through_nothing_but_our_own_rules(name):
    problems, given = operands(*GROUPS["all kinds"])
    assert gradgradcheck(lambda *X: ORDERS[name](*X, problems), [X.requires_grad_() for X in given])


def test_torch_func_forward_mode_and_compile():
    shapes, sides = GROUPS["all kinds"]
    problems, given = operands(shapes, sides)
    expected = dense("transform", shapes, sides, *given)
    torch.testing.assert_close(
        torch.func.vmap(lambda *X: transform(*X, problems))(*(X[:, None] for X in given))[:, 0], expected
    )
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(X, X) for X in given]
        tangent = forward_ad.unpack_dual(transform(*dual, problems)).tangent
    pushed = torch.func.jvp(lambda *X: dense("transform", shapes, sides, *X), tuple(given), tuple(given))[1]
    torch.testing.assert_close(tangent, pushed)
    compiled = torch.compile(lambda *X: transform(*X, problems), backend="aot_eager", fullgraph=True)
    leaves = [X.clone().requires_grad_() for X in given]
    torch.testing.assert_close(compiled(*leaves), expected)
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    truth = [X.clone().requires_grad_() for X in given]
    for mine, other in zip(grads, torch.autograd.grad(dense("transform", shapes, sides, *truth).square().sum(), truth)):
        torch.testing.assert_close(mine, other)


def test_half_types_and_autocast():
    shapes, sides = GROUPS["all kinds"]
    problems, given = operands(shapes, sides)
    expected = dense("transform", shapes, sides, *given)
    half = [X.bfloat16() for X in given]
    out = transform(*half, problems)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), dense("transform", shapes, sides, *(X.double() for X in half)), rtol=1e-2, atol=5e-2
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = transform(*(X.float() for X in given), problems)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_strides_no_tasks_and_what_is_not_finite():
    shapes, sides = GROUPS["all kinds"]
    problems, given = operands(shapes, sides, tasks=3, rows=(3, 1))
    strided = [torch.stack([X, X.flip(0)], -1)[..., 0] for X in given]
    assert not any(X.is_contiguous() for X in strided)
    expected = dense("transform", shapes, sides, *given)
    torch.testing.assert_close(transform(*strided, problems), expected)
    R, G, L = given
    nan = G.clone()
    nan[1] = torch.nan
    torch.testing.assert_close(transform(R, nan, L, problems)[[0, 2]], expected[[0, 2]])
    R, G, L = given[0][:1].requires_grad_(), G[:0].requires_grad_(), L.requires_grad_()
    grads = torch.autograd.grad(transform(R, G, L, problems).sum(), (R, G, L))
    assert [tuple(X.shape) for X in grads] == [tuple(X.shape) for X in (R, G, L)] and not any(X.any() for X in grads)


class Largest(TorchDispatchMode):
    """The elements of the largest storage that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("shape", [(3000, 4), (4, 3000), (5, 5, 30, 30)], ids=str)
@pytest.mark.parametrize("options", [{}, {"psd": False, "bias": True}, {"hidden_layers": 1}], ids=str)
def test_no_identity_of_the_long_side_in_any_order(shape, options):
    """Not stored, not multiplied: nothing as large as the side squared is ever returned by an operation."""
    weight = torch.randn(shape)
    with Largest() as largest:
        update = KFO([weight], max_factor=50, **options)
        phi, G = [row.detach().requires_grad_() for row in update.phi], weight.reshape(1, -1).clone().requires_grad_()
        grads = torch.autograd.grad(update.rule(tuple(phi), G).square().sum(), [*phi, G], create_graph=True)
        torch.autograd.grad(sum(X.square().sum() for X in grads), [*phi, G])
    assert 0 < largest.elements <= 2 * weight.numel()


def test_bad_sides_and_operands():
    for sides in (["RL"], ["RL", ""], ["RL", "LR"]):
        with pytest.raises(ValueError, match=r"sides: expected RL or R or L for each of 2, got "):
            Problems([(1, 2, 3), (1, 2, 3)], sides=sides)
    problems, (R, G, L) = operands([(1, 2, 3), (1, 2, 3), (1, 1, 2)], ["R", "RL", "L"])
    assert repr(problems) == "Problems([(1, 2, 3), (1, 2, 3), (1, 1, 2)], sides=['R', 'RL', 'L'])"
    for name, function in ORDERS.items():
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=rf"{name}: L has 26 columns, but shapes .* need 13"):
                function(R, G, torch.cat([L, L], 1), problems, backend=backend)
    # 2**64 elements in a factor that is not there.
    assert Problems([(1, 2**32, 1)], sides=["L"]).columns.R == 0


LABELS, SIZES = ["a", "b", "b", "a", "c", "a"], [2, 1, 3, 1, 2, 2]


def test_parts_are_the_columns_of_their_label():
    packed = torch.arange(22.0).view(2, 11)
    columns = [label for label, size in zip(LABELS, SIZES) for _ in range(size)]
    found = Parts(LABELS, SIZES).apart(packed)
    assert list(found) == ["a", "b", "c"]
    for label, part in found.items():
        assert torch.equal(part, packed[:, [i for i, other in enumerate(columns) if other == label]])
    assert torch.equal(Parts(LABELS, SIZES).together(found), packed)
    one = Parts(["x", "x"], [5, 6])
    assert one.apart(packed)["x"] is packed and one.together({"x": packed}) is packed


def test_derivatives_of_parts_make_no_row_for_each_run(monkeypatch):
    split = Parts(LABELS, SIZES)
    packed = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)

    def through(X):
        found = split.apart(X)
        # One part is left out, so that its cotangent is absent.
        return split.together({**found, "b": found["b"].sin(), "c": found["c"].detach() * 2})

    assert torch.autograd.gradgradcheck(through, packed)
    names: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    cotangent = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(split.together(split.apart(packed)), packed, cotangent, create_graph=True)
    with Calls():
        torch.autograd.grad(grad, cotangent, torch.ones_like(grad))
    assert not [name for name in names if "slice_backward" in name or "zeros" in name]
    ours = torch.autograd.grad(through(packed).square().sum(), packed)
    monkeypatch.setattr(parts, "plain", lambda: True)
    assert torch.equal(ours[0], torch.autograd.grad(through(packed).square().sum(), packed)[0])
