"""What every update of the package holds to, one test for each law; the updates are those of `update_table.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from update_table import SHAPES, STEPS, UPDATES, named_parameters, random_phi, randomised

from kfo_ext import MAML

TASKS = 3
# Of an update whose steps differ the last but one: neither the first nor all that there are.
STEP = {name: STEPS - 2 if name.endswith("per step") else None for name in UPDATES}
each = pytest.mark.parametrize("case", UPDATES.values(), ids=UPDATES)
each_step = pytest.mark.parametrize(("case", "step"), [(UPDATES[name], STEP[name]) for name in UPDATES], ids=UPDATES)


def gradients(tasks: int | None = None) -> list[torch.Tensor]:
    lead = () if tasks is None else (tasks,)
    return [torch.randn((*lead, *shape), dtype=torch.float64) for shape in SHAPES.values()]


def learned(case):
    """The update with other meta-parameters than at its start."""
    return randomised(case.make(named_parameters()))


@each_step
def test_starts_as_gradient_descent(case, step):
    update = case.make(named_parameters())
    assert all(row.shape[0] == 1 and row.numel() for row in update.phi)
    assert {id(row) for row in update.phi} == {id(row) for row in update.parameters()}
    for tasks in (None, TASKS):
        grads = gradients(tasks)
        for mine, grad in zip(update.transform(grads, step), grads, strict=True):
            torch.testing.assert_close(mine, grad, rtol=1e-14, atol=1e-14)


@each_step
def test_tasks_never_mix(case, step):
    update = case.make(named_parameters())
    phi, G = random_phi(update, TASKS), torch.randn(TASKS, update.packing.numel, dtype=torch.float64)
    together = update.rule_at(phi, G, step)
    for i in range(TASKS):
        alone = update.rule_at(tuple(row[i : i + 1] for row in phi), G[i : i + 1], step)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    wrong = [torch.cat([torch.full_like(X[:1], torch.nan), X[1:]]) for X in (*phi, G)]
    again = update.rule_at(tuple(wrong[:-1]), wrong[-1], step)
    torch.testing.assert_close(again[1:], together[1:], rtol=1e-12, atol=1e-12)


@each_step
@pytest.mark.parametrize("tasks", [None, TASKS])
def test_lists_dicts_and_packed_rows_agree(case, step, tasks):
    update, grads = learned(case), gradients(tasks)
    packed = torch.cat([grad.reshape(tasks or 1, -1) for grad in grads], 1)
    expected = update.packing.unpack(update.rule_at(update.phi, packed, step), batched=bool(tasks))
    by_name = dict(reversed(list(zip(SHAPES, grads))))
    updates = update.transform(by_name, step)
    assert list(updates) == list(by_name)
    for name, mine, other in zip(SHAPES, update.transform(grads, step), expected, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(updates[name], other)
    some = {**by_name, "conv.bias": None}
    assert update.transform(some, step)["conv.bias"] is None
    assert torch.equal(update.transform(some, step)["head.1.weight"], updates["head.1.weight"])


@each_step
def test_the_gradients_of_a_loss_by_name(case, step):
    """Handed over in another order, each parameter still gets its own update."""
    update = learned(case)
    parameters = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()}

    def loss():
        return sum((i + 1) * p.sin().sum() for i, p in enumerate(parameters.values()))

    listed = update(loss(), parameters.values(), step=step)
    shuffled = dict(sorted(parameters.items(), key=lambda entry: entry[0][::-1]))
    found = update(loss(), shuffled, step=step)
    assert list(found) == list(shuffled)
    assert list(found) != list(SHAPES)
    assert all(torch.equal(found[name], mine) for name, mine in zip(SHAPES, listed, strict=True))


@each_step
@pytest.mark.parametrize("rows", [1, TASKS])
def test_two_derivatives_equal_plain_torch(case, step, rows):
    update = case.make(named_parameters())
    phi = random_phi(update, rows)
    G = torch.randn(TASKS, update.packing.numel, dtype=torch.float64, requires_grad=True)
    rule = case.rule(update, step)

    def plain(*given):
        tasks = []
        for i, row in enumerate(given[-1]):
            grads = [piece.view(shape) for piece, shape in zip(row.split(update.packing.sizes), SHAPES.values())]
            mine = [X[i : i + 1] if rows > 1 else X for X in given[:-1]]
            tasks.append(torch.cat([U.reshape(-1) for U in rule(mine, grads)]))
        return torch.stack(tasks)

    def orders(function):
        generator = torch.Generator().manual_seed(1)

        def weighted(X):
            return (torch.randn(X.shape, generator=generator, dtype=X.dtype) * X**2).sum()

        value = function(*phi, G)
        first = torch.autograd.grad(weighted(value), [*phi, G], create_graph=True)
        return [value, *first, *torch.autograd.grad(sum(weighted(X) for X in first), [*phi, G])]

    for mine, other in zip(orders(lambda *X: update.rule_at(X[:-1], X[-1], step)), orders(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@each
def test_the_state_survives_a_round_trip_and_refuses_others(case, tmp_path):
    update = learned(case)
    torch.save(update.state_dict(), tmp_path / "update.pt")
    state = torch.load(tmp_path / "update.pt", weights_only=True)
    fresh = case.make(named_parameters())
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.phi, update.phi, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(update).phi, update.phi, strict=True))
    if not update.phi:
        assert not state
        return
    reshaped = {**SHAPES, "head.0.weight": (5, 3)}
    renamed = {name.replace("head.0", "head.2"): shape for name, shape in SHAPES.items()}
    for shapes, wrong in ((reshaped, r"'head.0.weight' of shape \(5, 3\)"), (renamed, r"'head.2.weight'")):
        other = case.make(named_parameters(shapes))
        before = copy.deepcopy(other.phi)
        with pytest.raises(ValueError, match=f"state_dict: expected meta-parameters for parameter {wrong}"):
            other.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(other.phi, before))
    for name, others in UPDATES.items():
        other = others.make(named_parameters())
        if others is not case and other.phi and other._made_for() != update._made_for():
            with pytest.raises(ValueError, match="state_dict: expected meta-parameters with "):
                other.load_state_dict(state)
            assert name


@each_step
def test_operands_that_do_not_fit_are_refused(case, step):
    """Above all those that torch would broadcast."""
    update = case.make(named_parameters())
    phi, G = random_phi(update, TASKS), torch.randn(TASKS, update.packing.numel, dtype=torch.float64)
    if not phi:
        assert update.rule(phi, G) is G
        return
    wrong = [(phi, G[:, :1]), (phi, G[:, :-1]), (phi[:-1], G), ((*phi, phi[0]), G)]
    for i, row in enumerate(phi):
        others = [row[:, :-1], row[:2]] + [row[:, :1]] * (row.shape[1] > 1)
        wrong += [((*phi[:i], other, *phi[i + 1 :]), G) for other in others]
    for given in wrong:
        with pytest.raises(ValueError, match=r"expected|need"):
            update.rule_at(*given, step)


@each_step
def test_half_types_and_autocast(case, step):
    """They compute in float32; the update has the gradients' type outside autocast."""
    update = learned(case)
    grads = gradients(TASKS)
    expected = update.transform(grads, step)
    half = copy.deepcopy(update).bfloat16().transform([grad.bfloat16() for grad in grads], step)
    for mine, other in zip(half, expected):
        assert mine.dtype == torch.bfloat16
        assert (mine - other).abs().max() < 0.04 * other.abs().max()
    single = copy.deepcopy(update).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = single.transform([grad.float() for grad in grads], step)
    for mine, other in zip(cast, expected):
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-4)


@each_step
def test_under_torch_func(case, step):
    update = case.make(named_parameters())
    phi, G = random_phi(update, TASKS), torch.randn(TASKS, update.packing.numel, dtype=torch.float64)
    weights = torch.randn_like(G)

    def value(*given):
        return (weights * update.rule_at(given[:-1], given[-1], step).sin()).sum()

    given = [X.detach().requires_grad_() for X in (*phi, G)]
    expected = torch.autograd.grad(value(*given), given)
    found = torch.func.grad(value, argnums=tuple(range(len(given))))(*(X.detach() for X in given))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    alone = torch.func.vmap(lambda *X: update.rule_at(tuple(row[None] for row in X[:-1]), X[-1][None], step)[0])
    torch.testing.assert_close(
        alone(*(X.detach() for X in given)), update.rule_at(phi, G, step).detach(), rtol=1e-10, atol=1e-10
    )


@each
def test_another_model_is_refused(case):
    class Model(torch.nn.Module):
        def __init__(self, shapes) -> None:
            super().__init__()
            for name, shape in shapes.items():
                self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.ones(shape)))

    def named(shapes):
        return [(name.replace("_", "."), p) for name, p in Model(shapes).named_parameters()]

    shapes = {name.replace(".", "_"): shape for name, shape in SHAPES.items()}
    update = case.make(named(shapes))
    # As a learner names them.
    names = {name: name.replace(".", "_") for name in update.packing.names}
    update.packing = type(update.packing)([names[name] for name in update.packing.names], update.packing.shapes)
    MAML(Model(shapes), update=update, lr=0.1, steps=1)
    for other, message in (
        ({**shapes, "head_0_weight": (5, 3)}, r"'head_0_weight' of shape \(5, 3\)"),
        ({name.replace("0", "2"): shape for name, shape in shapes.items()}, "'head_2_weight'"),
        (dict(list(shapes.items())[:-1]), "for 8 parameters, got one for 9; not adapted: head_1_bias"),
    ):
        with pytest.raises(ValueError, match=f"update: expected .*{message}"):
            MAML(Model(other), update=update, lr=0.1, steps=1)
