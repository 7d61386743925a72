"""Derivatives on the device: gradcheck of every order, opcheck, and orders to 4 against the plain reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kfo_ext import transform
from kfo_ext.ops.transform import reference
from kfo_ext.problems import Problems
from kfo_ext.testing import random_operands, with_strides

pytestmark = pytest.mark.gpu

SHAPES = [(3, 2, 3), (1, 2, 1), (1, 2, 3)]
PROBLEMS = Problems(SHAPES)
FLAT = PROBLEMS.flat
ROWS = {"per_task": (2, 2), "shared": (1, 1)}
EVERY = [True] * 4

rows_param = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def leaves(device, rows):
    return [X.requires_grad_() for X in random_operands(SHAPES, 2, rows=rows, device=device)]


@rows_param
def test_public_transform(backend, device, rows):
    R, G, L, *_, bias = leaves(device, rows)

    def public(R, G, L, bias):
        return transform(R, G, L, PROBLEMS, bias=bias, backend=backend)

    assert gradcheck(public, (R, G, L, bias), fast_mode=True)
    assert gradgradcheck(public, (R, G, L, bias), fast_mode=True)


@rows_param
def test_forward(family, device, rows):
    R, G, L, *_ = leaves(device, rows)
    assert gradcheck(lambda *X: family.transform(*X, FLAT), (R, G, L))
    assert gradgradcheck(lambda *X: family.transform(*X, FLAT), (R, G, L))


@rows_param
def test_backward(family, device, rows):
    R, G, L, dY, *_ = leaves(device, rows)
    assert gradcheck(lambda *X: family.backward(*X, FLAT, EVERY[:3]), (R, G, L, dY))
    assert gradgradcheck(lambda *X: family.backward(*X, FLAT, EVERY[:3]), (R, G, L, dY), fast_mode=True)


@rows_param
def test_double_backward(family, device, rows):
    X = leaves(device, rows)[:7]
    assert gradcheck(lambda *X: family.double_backward(*X, FLAT, EVERY), X, fast_mode=True)
    assert gradgradcheck(lambda *X: family.double_backward(*X, FLAT, EVERY), X, fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@rows_param
def test_opcheck(family, device, rows, layout):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    X = random_operands(SHAPES, 2, rows=rows, device=device)
    if layout == "transposed":
        X = [with_strides(operand, layout) for operand in X]
    R, G, L, dY, ddR, ddG, ddL, bias = (operand.requires_grad_() for operand in X)
    torch.library.opcheck(family.transform, (R, G, L, FLAT))
    torch.library.opcheck(family.transform, (R, G, L, FLAT, bias))
    torch.library.opcheck(family.backward, (R, G, L, dY, FLAT, EVERY[:3]))
    torch.library.opcheck(family.backward, (R, G, L, dY, FLAT, [True, False, True]))
    torch.library.opcheck(family.double_backward, (R, G, L, dY, ddR, ddG, ddL, FLAT, EVERY))
    torch.library.opcheck(family.double_backward, (R, G, L, dY, None, ddG, None, FLAT, [True, False, True, True]))


@rows_param
def test_orders_one_to_four_equal_the_reference(backend, device, rows):
    results = []
    for function in (
        lambda *X: transform(*X, PROBLEMS, backend=backend),
        lambda *X: reference.transform(*X, FLAT),
    ):
        X = leaves(device, rows)[:3]
        value = (function(*X).tanh() ** 2).sum()
        weights = torch.Generator().manual_seed(5)
        orders = []
        for _ in range(4):
            grads = torch.autograd.grad(value, X, create_graph=True)
            orders += [grad.detach() for grad in grads]
            draws = [torch.randn(grad.shape, generator=weights, dtype=grad.dtype).to(device) for grad in grads]
            value = sum((grad * draw).sum() for grad, draw in zip(grads, draws))
        results.append(orders)
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_autocast_computes_in_float32(backend, device):
    R, G, L, *_ = (X.float() for X in random_operands(SHAPES, 2, device=device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        Y = transform(R, G.bfloat16(), L, PROBLEMS, backend=backend)
    assert Y.dtype == torch.float32
    torch.testing.assert_close(Y, reference.transform(R, G.bfloat16().float(), L, FLAT))
