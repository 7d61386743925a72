"""`adjoint`, R G L^T, against plain torch written here: values, four orders, forward mode, compile, each backend."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from kfo_ext.functional import adjoint, transform
from kfo_ext.ops.transform.op import NATIVE
from kfo_ext.problems import Problems
from kfo_ext.testing import CASES, random_operands

SHAPES = [(3, 2, 3), (1, 2, 1), (1, 2, 3)]
BACKENDS = ["reference", *(["native"] if NATIVE else [])]
rows_param = pytest.mark.parametrize("rows", [(2, 2), (1, 1), (1, 2)], ids=str)


def plain(R, G, L, shapes=SHAPES):
    """Matrix by matrix: nothing of the package."""
    out, at_R, at_G, at_L = [], 0, 0, 0
    for B, p, q in shapes:
        R_i = R[:, at_R : at_R + p * p].reshape(len(R), 1, p, p)
        L_i = L[:, at_L : at_L + q * q].reshape(len(L), 1, q, q)
        G_i = G[:, at_G : at_G + B * p * q].reshape(len(G), B, p, q)
        out.append((R_i @ G_i @ L_i.mT).flatten(1))
        at_R, at_G, at_L = at_R + p * p, at_G + B * p * q, at_L + q * q
    return torch.cat(out, 1)


def public(R, G, L, backend="auto"):
    return adjoint(R, G, L, Problems(SHAPES), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [(3, 3), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values(case, rows, backend):
    R, G, L, *_ = random_operands(CASES[case], 3, rows=rows)
    actual = adjoint(R, G, L, Problems(CASES[case]), backend=backend)
    torch.testing.assert_close(actual, plain(R, G, L, CASES[case]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_law(backend):
    """<transform(R, X, L), G> = <X, adjoint(R, G, L)>."""
    R, X, L, G, *_ = random_operands(SHAPES, 2)
    problems = Problems(SHAPES)
    left = (transform(R, X, L, problems, backend=backend) * G).sum()
    torch.testing.assert_close(left, (X * adjoint(R, G, L, problems, backend=backend)).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@rows_param
def test_gradcheck(rows, backend):
    X = [operand.requires_grad_() for operand in random_operands(SHAPES, 2, rows=rows)[:3]]
    assert gradcheck(lambda *X: public(*X, backend), X)
    assert gradgradcheck(lambda *X: public(*X, backend), X)


@pytest.mark.parametrize("wanted", range(1, 8))
@rows_param
def test_four_orders(rows, wanted):
    """Of each subset of the operands; the last order without a graph, as an outer backward pass takes it."""
    found = []
    for function in (public, plain):
        X = random_operands(SHAPES, 2, rows=rows)[:3]
        X = [operand.requires_grad_(bool(wanted >> i & 1)) for i, operand in enumerate(X)]
        leaves = [operand for operand in X if operand.requires_grad]
        value, orders = (function(*X).tanh() ** 2).sum(), []
        for order in range(4):
            grads = torch.autograd.grad(value, leaves, create_graph=order < 3, materialize_grads=True)
            orders += [grad.detach() for grad in grads]
            value = sum((grad * operand.detach().cos()).sum() for grad, operand in zip(grads, leaves))
        found.append(orders)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_forward_mode_and_batched_gradients():
    X = random_operands(SHAPES, 2)[:3]
    cotangents = torch.randn(3, *X[1].shape, dtype=torch.float64)
    tangents, grads = [], []
    for function in (public, plain):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(operand, operand.cos()) for operand in X]
            tangents.append(forward_ad.unpack_dual(function(*duals)).tangent)
        leaves = [operand.clone().requires_grad_() for operand in X]
        grads.append(torch.autograd.grad(function(*leaves), leaves, cotangents, is_grads_batched=True))
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(*grads)


def test_compiled():
    torch.compiler.reset()
    step = torch.compile(lambda R, G, L: (public(R, G, L).tanh() ** 2).sum(), backend="aot_eager", fullgraph=True)
    grads = []
    for function in (step, lambda *X: (plain(*X).tanh() ** 2).sum()):
        X = [operand.requires_grad_() for operand in random_operands(SHAPES, 2, rows=(1, 2))[:3]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads.append(torch.autograd.grad(function(*X), X))
    torch.testing.assert_close(*grads)


def test_half_types_and_autocast():
    """Both compute in float32."""
    R, G, L = (operand.float() for operand in random_operands(SHAPES, 2)[:3])
    half = [operand.bfloat16() for operand in (R, G, L)]
    wide = public(*(operand.float() for operand in half))
    assert torch.equal(public(*half), wide.bfloat16())
    torch.testing.assert_close(wide, plain(*(operand.float() for operand in half)))
    expected = plain(R, half[1].float(), L)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(public(R, half[1], L), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_task(backend):
    R, G, L, *_ = random_operands(SHAPES, 2)
    G[0] = float("nan")
    out = public(R, G, L, backend)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], plain(R, G, L)[1:])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_operands(backend):
    R, G, L, *_ = random_operands(SHAPES, 2)
    with pytest.raises(ValueError, match="L has 18 columns, but shapes"):
        public(R, G, L[:, :-1], backend)
    with pytest.raises(TypeError, match=r"R: expected torch\.float64 as G has"):
        public(R.float(), G, L, backend)
    with pytest.raises(TypeError, match="problems: expected Problems, got list"):
        adjoint(R, G, L, SHAPES)
