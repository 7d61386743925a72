"""Packing and unpacking: each other's derivative, to any order, without a row of zeros for each tensor."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kfo_ext import KFO, packing
from kfo_ext.packing import Packing
from kfo_ext.updates.moved import moved

SHAPES = [torch.Size(shape) for shape in ((3, 2, 2), (4,), (1, 1), (2, 3))]
PACKING = Packing([f"p{i}" for i in range(len(SHAPES))], SHAPES)


def tensors(rows: int | None, strided: bool = False) -> list[torch.Tensor]:
    lead = () if rows is None else (rows,)
    made = [torch.randn((*lead, *shape, 2), dtype=torch.float64) for shape in SHAPES]
    return [(X[..., 0] if strided else X[..., 0].contiguous()).requires_grad_() for X in made]


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_derivatives_of_both(rows, strided):
    given = tensors(rows, strided)

    def pack(*X):
        return PACKING.pack(X).sin()

    def unpack(packed):
        return tuple(piece.sin() for piece in PACKING.unpack(packed, batched=rows is not None))

    torch.autograd.gradcheck(pack, given)
    torch.autograd.gradgradcheck(pack, given)
    packed = PACKING.pack(given).detach().requires_grad_()
    torch.autograd.gradcheck(unpack, packed)
    torch.autograd.gradgradcheck(unpack, packed)


@pytest.mark.parametrize("rows", [None, 3])
def test_orders_equal_torch_own(rows):
    """Four orders of a product of both, against cat and split themselves."""
    weights = [torch.randn_like(X) for X in tensors(rows)]

    def powers(pack, unpack, given):
        packed = pack(given)
        return sum((w * X**4).sum() for w, X in zip(weights, unpack(packed * packed.detach().cos() + packed**2)))

    def orders(pack, unpack) -> list[torch.Tensor]:
        value, found = powers(pack, unpack, given), []
        for _ in range(4):
            grads = torch.autograd.grad(value, given, create_graph=True)
            found += grads
            value = sum((w * X**2).sum() for w, X in zip(weights, grads))
        return found

    given, batched = tensors(rows), rows is not None
    ours = orders(PACKING.pack, lambda packed: PACKING.unpack(packed, batched=batched))
    theirs = orders(lambda X: PACKING.joined(X, rows), lambda packed: PACKING.pieces(packed, batched))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_absent_tensors_and_absent_cotangents_are_zeros():
    given = tensors(3)
    given[1] = None
    packed = PACKING.pack(given)
    assert not packed[:, 12:16].any()
    packed.sum().backward()
    assert all(torch.equal(X.grad, torch.ones_like(X)) for X in given if X is not None)
    whole = torch.randn(3, PACKING.numel, requires_grad=True)
    PACKING.unpack(whole)[2].sum().backward()
    assert whole.grad.sum() == 3
    assert torch.equal(whole.grad[:, 16], torch.ones(3))
    frozen = [X.detach() for X in tensors(None)]
    assert not PACKING.pack(frozen).requires_grad


def test_differentiating_a_derivative_makes_no_row_for_each_tensor():
    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    given = tensors(3)
    cotangent = torch.randn(3, PACKING.numel, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(PACKING.pack(given), given, cotangent, create_graph=True)
    with Calls() as calls:
        (found,) = torch.autograd.grad(grads, cotangent, [torch.ones_like(X) for X in grads])
    assert torch.equal(found, torch.ones_like(found))
    assert calls.names.count("aten::cat") == 1
    assert not [name for name in calls.names if "slice_backward" in name or "zeros" in name]


def test_batched_cotangents():
    given = tensors(3)
    packed = PACKING.pack(given)
    cotangents = torch.randn(5, *packed.shape, dtype=packed.dtype)
    batched = torch.autograd.grad(packed, given, cotangents, is_grads_batched=True, create_graph=True)
    for i, cotangent in enumerate(cotangents):
        for X, row in zip(torch.autograd.grad(packed, given, cotangent, retain_graph=True), batched, strict=True):
            assert torch.equal(X, row[i])


def test_any_collection_of_tensors_is_packed():
    given = dict(enumerate(tensors(2)))
    assert torch.equal(PACKING.pack(given.values()), PACKING.pack(list(given.values())))


def test_under_torch_func_and_compile():
    given = [X.detach() for X in tensors(None)]
    packed = PACKING.pack(given)[0]

    def value(*X):
        return (PACKING.pack(X) ** 2).sum()

    assert torch.equal(torch.cat([g.reshape(-1) for g in torch.func.grad(value, tuple(range(4)))(*given)]), 2 * packed)
    _, tangent = torch.func.jvp(value, tuple(given), tuple(given))
    torch.testing.assert_close(tangent, 2 * (packed**2).sum())
    mapped = torch.func.vmap(lambda row: torch.cat([X.reshape(-1) for X in PACKING.unpack(row[None])]))
    assert torch.equal(mapped(packed.expand(5, -1)), packed.expand(5, -1))
    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    leaves = [X.clone().requires_grad_() for X in given]
    compiled(*leaves).backward()
    assert all(torch.equal(X.grad, 2 * X.detach()) for X in leaves)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_a_call_of_an_update_checks_its_list_once_and_by_the_short_way(rows, monkeypatch):
    counted, slow = [], []
    monkeypatch.setattr(packing, "check_dense", lambda *given: slow.append(given))
    tasks = Packing.tasks
    monkeypatch.setattr(Packing, "tasks", lambda *given: counted.append(given) or tasks(*given))
    KFO([(name, X.detach()) for name, X in zip(PACKING.names, tensors(None))], only=["p[123]"]).transform(tensors(rows))
    assert len(counted) == 1
    assert not slow


def test_lists_with_and_without_a_task_dimension_are_told_apart():
    """A bias (4,) of no task and one (4, 4) of four; what is neither is named."""
    one = Packing(["bias"], [torch.Size([4])])
    assert one.tasks([torch.ones(4)], "X") is None
    assert one.tasks([torch.ones(4, 4)], "X") == 4
    for given in (torch.ones(5), torch.ones(2, 5), torch.ones(1, 2, 4), torch.ones(())):
        with pytest.raises(ValueError, match=r"X\['bias'\]: expected shape \(4,\) or \(tasks, \*\(4,\)\)"):
            one.tasks([given], "X")
    two = Packing(["a", "b"], [torch.Size([4]), torch.Size([4, 4])])
    assert two.tasks([torch.ones(4), torch.ones(4, 4)], "X") is None
    with pytest.raises(ValueError, match=r"X\['b'\]: expected the task dimension of 'a', 4, got None"):
        two.tasks([torch.ones(4, 4), torch.ones(4, 4)], "X")


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_a_step_of_parameters_is_that_of_the_formula(rows):
    of = Packing(["a", "b", "c"], [torch.Size(shape) for shape in ((2, 3), (), (1, 4))])
    lead = () if rows is None else (rows,)
    params = [torch.randn((*lead, *shape), dtype=torch.float64, requires_grad=True) for shape in of.shapes]
    U = torch.randn(rows or 1, of.numel, dtype=torch.float64, requires_grad=True)

    def step(U, *params):
        return tuple(moved(of, params, U, 0.3, rows))

    pieces = U.split(of.sizes, dim=1)
    for after, X, piece in zip(step(U, *params), params, pieces, strict=True):
        torch.testing.assert_close(after, X - 0.3 * piece.reshape(X.shape), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(step, (U, *params))
    assert torch.autograd.gradgradcheck(step, (U, *params))
    # Of a result that no loss depends on.
    (dU,) = torch.autograd.grad(step(U, *params)[1].sum(), U)
    expected = torch.zeros_like(U)
    expected[:, of.sizes[0]] = -0.3
    torch.testing.assert_close(dU, expected)
