"""`Update.step`: loops of one's own have the meta-gradients of plain torch; what it refuses; endless loops."""

from __future__ import annotations

import copy
import itertools
import weakref
from functools import partial
from typing import ClassVar

import pytest
import torch
from plain_maml import assert_equal_truth, measured, plain_kfo, plain_maml
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy, mse_loss
from update_network import TASKS, batch, network
from update_table import SHAPES, STEPS, UPDATES, named_parameters, randomised

from kfo_ext import KFO, MAML, GradientDescent, MetaResult, MetaSGD, Update
from kfo_ext.tasks import Examples, TaskBatch

LR = 0.2


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def loss_of(model: nn.Module, params, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(functional_call(model, params, (x,)), y)


class Loop(nn.Module):
    """The meta-loss of a batch, by a loop written by hand with `step`; a way to write it for each subclass."""

    def __init__(self, model: nn.Module, update: Update, steps: int, **options) -> None:
        super().__init__()
        self.model, self.update, self.steps, self.options = model, update, steps, {"lr": LR, **options}

    def losses(self, tasks: TaskBatch) -> Tensor:
        raise NotImplementedError

    def forward(self, tasks: TaskBatch) -> MetaResult:
        losses = self.losses(tasks)
        return MetaResult(losses.mean(), losses.new_empty(0), losses.detach(), None)


class ByTask(Loop):
    """A dict of parameters, task by task."""

    def losses(self, tasks):
        found = []
        for sx, sy, qx, qy in zip(*tasks.support, *tasks.query):
            params, state = dict(self.model.named_parameters()), None
            for _ in range(self.steps):
                loss = loss_of(self.model, params, sx, sy)
                # In another order than the packing's.
                shuffled = dict(sorted(params.items(), key=lambda entry: entry[0][::-1]))
                params, state = self.update.step(loss, shuffled, state, **self.options)
                assert list(params) == list(shuffled)
            found.append(loss_of(self.model, params, qx, qy))
        return torch.stack(found)


class AtOnce(Loop):
    """A list of parameters with a task dimension, and a loss for each task."""

    def losses(self, tasks):
        def all_losses(params, x, y):
            return vmap(partial(loss_of, self.model))(dict(zip(SHAPES, params)), x, y)

        params, state = [p.expand(TASKS, *p.shape) for p in self.model.parameters()], None
        for _ in range(self.steps):
            params, state = self.update.step(all_losses(params, *tasks.support), params, state, **self.options)
        return all_losses(params, *tasks.query)


class ByGradients(Loop):
    """Gradients of all tasks by torch.func, the steps outside of it."""

    def losses(self, tasks):
        of = partial(loss_of, self.model)
        params = {name: p.expand(len(tasks.support.x), *p.shape) for name, p in self.model.named_parameters()}
        state = None
        for _ in range(self.steps):
            params, state = self.update.step(vmap(grad(of))(params, *tasks.support), params, state, **self.options)
        return vmap(of)(params, *tasks.query)


class Mapped(Loop):
    """The whole loop of a task under vmap."""

    def losses(self, tasks):
        of = partial(loss_of, self.model)

        def task(sx, sy, qx, qy):
            params, state = dict(self.model.named_parameters()), None
            for _ in range(self.steps):
                params, state = self.update.step(grad(of)(params, sx, sy), params, state, **self.options)
            return of(params, qx, qy)

        return vmap(task)(*tasks.support, *tasks.query)


def learned(name: str, model: nn.Module) -> Update:
    return randomised(UPDATES[name].make(list(model.named_parameters())))


OPTIONS = {
    "one step": {"steps": 1},
    "three steps": {"steps": STEPS},
    "first order": {"steps": STEPS, "first_order": True},
    "adapted": {"steps": STEPS, "adapt_update": True},
}
POINTS = [
    (name, option) for name in UPDATES for option in OPTIONS if name != "gradient descent" or "adapt" not in option
]


@pytest.mark.parametrize(("name", "option"), POINTS)
def test_meta_gradients_equal_plain_torch(name, option):
    model, tasks, options = network(), batch(), OPTIONS[option]
    update = learned(name, model)
    rule = UPDATES[name].plain(update)
    truth = plain_maml(model, tasks, cross_entropy, lr=LR, rule=rule, phi=list(update.phi), **options)
    for way in (ByTask, AtOnce, ByGradients, Mapped):
        assert_equal_truth(way(model, update, **options), tasks, truth, tolerance=1e-10)


@pytest.mark.parametrize("name", ["meta-sgd per step", "low rank", "chain", "by name", "kfo psd", "kfo hidden"])
def test_first_order_adapted_equals_the_learner(name):
    model, tasks = network(), batch()
    update = learned(name, model)
    options = {"steps": STEPS, "first_order": True, "adapt_update": True}
    expected = measured(MAML(model, update=update, lr=LR, **options), tasks)
    for way in (ByTask, AtOnce, ByGradients, Mapped):
        got = measured(way(model, update, **options), tasks)
        close(got[3], expected[3])


def test_one_step_of_an_adapted_update_is_a_plain_one():
    model, tasks = network(), batch()
    update = learned("kfo", model)
    expected, got = (
        measured(ByTask(model, update, 1, adapt_update=adapt_update), tasks) for adapt_update in (False, True)
    )
    torch.testing.assert_close(got[3], expected[3], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "option"), [point for point in POINTS if point[1] != "one step"])
@pytest.mark.parametrize("way", [ByGradients, Mapped])
def test_torch_func_differentiates_loops(way, name, option):
    """`grad` of all tasks, and vmap of `grad`: over tasks, and over phi alone; nothing requires a gradient."""
    model, tasks, options = network(), batch(), OPTIONS[option]
    loop = way(model, learned(name, model), **options)
    rule = UPDATES[name].plain(loop.update)
    learnable = {place: p.detach() for place, p in loop.named_parameters()}
    # phi comes in the order of the update, not in that of its modules.
    places = [next(place for place, p in loop.named_parameters() if p is row) for row in loop.update.phi]

    def meta_loss(learnable, tasks):
        return functional_call(loop, learnable, (tasks,)).loss

    def check(found, tasks, phi):
        truth = plain_maml(model, tasks, cross_entropy, lr=LR, rule=rule, phi=phi, **options).gradients
        mine = [found[place] for place in (*(f"model.{name}" for name in SHAPES), *places)]
        close(mine, truth)

    phi = list(loop.update.phi)
    check(grad(meta_loss)(learnable, tasks), tasks, phi)
    apart = TaskBatch(*(Examples(*(X.unsqueeze(1) for X in part)) for part in tasks))
    found = vmap(grad(meta_loss), (None, 0))(learnable, apart)
    for i in range(TASKS):
        one = TaskBatch(*(Examples(*(X[i] for X in part)) for part in apart))
        check({place: X[i] for place, X in found.items()}, one, phi)
    if phi:
        several = [torch.stack([row.detach(), row.detach() + 0.1 * torch.randn_like(row)]) for row in phi]
        dims = {place: 0 if place in places else None for place in learnable}
        found = vmap(grad(meta_loss), (dims, None))({**learnable, **dict(zip(places, several))}, tasks)
        for i in range(2):
            mine = [rows[i].requires_grad_() for rows in several]
            check({place: X[i] for place, X in found.items()}, tasks, mine)


def test_a_mapped_loop_adapts_without_a_gradient():
    """phi is adapted where neither autograd nor torch.func differentiates by it."""
    model, tasks = network(), batch()
    loop = Mapped(model, learned("kfo", model), STEPS, adapt_update=True)
    learnable = {name: p.detach() for name, p in loop.named_parameters()}
    losses = functional_call(loop, learnable, (tasks,)).query_losses
    close(losses, loop(tasks).query_losses)


class TwoSteps(nn.Module):
    """All parameters after two steps with given gradients, in one row."""

    def __init__(self, update: Update, adapt_update: bool) -> None:
        super().__init__()
        self.update, self.options = update, {"lr": LR, "adapt_update": adapt_update}

    def forward(self, first, second, params):
        params, state = self.update.step(first, params, **self.options)
        params, _ = self.update.step(second, params, state, **self.options)
        return torch.cat([p.flatten() for p in params.values()])


@pytest.mark.parametrize("adapt_update", [False, True])
@pytest.mark.parametrize("name", ["meta-sgd per step", "kfo", "kfo max_factor hidden"])
def test_whatever_is_mapped_equals_a_loop(name, adapt_update):
    """Each choice of phi, the gradients of either step and params, such as factors without gradients."""
    module = TwoSteps(randomised(UPDATES[name].make(named_parameters())), adapt_update)
    given = [dict(module.named_parameters()), *(dict(named_parameters()) for _ in range(3))]
    value = lambda *X: functional_call(module, X[0], X[1:]).pow(2).sum()  # noqa: E731
    for mapped in itertools.product([None, 0], repeat=4):
        if any(dim == 0 for dim in mapped):
            operands = [
                {key: (X if dim is None else torch.stack([X, X.cos(), X.sin()])).detach() for key, X in part.items()}
                for part, dim in zip(given, mapped)
            ]
            found, values = vmap(grad_and_value(value, argnums=(0, 1, 2, 3)), mapped)(*operands)
            for i in range(3):
                one = [
                    {key: (X if dim is None else X[i]).clone().requires_grad_() for key, X in part.items()}
                    for part, dim in zip(operands, mapped)
                ]
                expected = value(*one)
                close(values[i], expected)
                close(
                    [X[i] for part in found for X in part.values()],
                    list(torch.autograd.grad(expected, [X for part in one for X in part.values()])),
                )


def parts(**options) -> tuple[nn.Module, KFO, Tensor, Tensor]:
    """A small network, a KFO of its own and a task."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    update = randomised(KFO(model.named_parameters(), psd=False, **options))
    return model, update, torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)


def error_of(model, params, x, y) -> Tensor:
    return mse_loss(functional_call(model, params, (x,)), y)


class Node:
    """Lives as long as the node of a graph."""


class Counted(torch.autograd.Function):
    """The identity, whose backward passes and live nodes are counted."""

    passes = 0
    nodes: ClassVar[weakref.WeakSet[Node]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, X):
        ctx.node = Node()
        Counted.nodes.add(ctx.node)
        return X.view_as(X)

    @staticmethod
    def backward(ctx, dX):
        Counted.passes += 1
        return Counted.apply(dX)


def test_a_step_is_one_backward_pass():
    model, update, x, y = parts()
    params, state = dict(model.named_parameters()), None
    for number in range(1, 5):
        loss = mse_loss(Counted.apply(functional_call(model, params, (x,))), y)
        Counted.passes = 0
        params, state = update.step(loss, params, state, lr=0.1, adapt_update=True)
        assert Counted.passes == 1
        assert state.number == number


def test_nothing_changes_in_place():
    model, update, x, y = parts()
    before = copy.deepcopy([*model.parameters(), *update.parameters()])
    params, states = dict(model.named_parameters()), [None]
    for _ in range(3):
        kept = {name: p.clone() for name, p in params.items()}
        moved, state = update.step(
            error_of(model, params, x, y), params, states[-1], lr=0.1, adapt_update=True, first_order=True
        )
        again, _ = update.step(
            error_of(model, params, x, y), params, states[-1], lr=0.1, adapt_update=True, first_order=True
        )
        assert all(torch.equal(moved[name], again[name]) for name in moved)
        assert all(torch.equal(params[name], kept[name]) for name in kept)
        params = moved
        states.append(state)
    assert all(torch.equal(a, b) for a, b in zip(before, [*model.parameters(), *update.parameters()]))
    assert all(p.grad is None for p in (*model.parameters(), *update.parameters()))


def test_unused_parameters_stay():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.spare, self.last = nn.Linear(4, 5), nn.Linear(2, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.first(x).tanh())

    model = Partial().double()
    update = randomised(KFO(model.named_parameters(), hidden_layers=1))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    tasks = TaskBatch(Examples(x, x[..., :3].sin()), Examples(x.flip(1), x[..., 1:].cos()))
    options = {"adapt_update": True, "allow_unused": True}
    expected = measured(MAML(model, update=update, lr=LR, steps=3, loss=mse_loss, **options), tasks)
    losses = []
    for sx, sy, qx, qy in zip(*tasks.support, *tasks.query):
        params, state = dict(model.named_parameters()), None
        for _ in range(3):
            params, state = update.step(error_of(model, params, sx, sy), params, state, lr=LR, **options)
        assert torch.equal(params["spare.weight"], model.spare.weight)
        losses.append(error_of(model, params, qx, qy))
    learnable = [*model.parameters(), *update.phi]
    found = torch.autograd.grad(sum(losses) / 2, learnable, materialize_grads=True, allow_unused=True)
    close(list(found), expected[3])
    loss = error_of(model, params, x[0], tasks.support.y[0])
    with pytest.raises(ValueError, match=r"params\['spare\.weight'\]: the loss does not depend on it; allow_unused"):
        update.step(loss, params, state, lr=LR, adapt_update=True)
    with pytest.raises(ValueError, match=r"loss: does not depend on any of the params"):
        update.step(x.clone().requires_grad_().sum(), params, state, lr=LR, **options)


def test_frozen_meta_parameters_are_not_adapted():
    """As in the learner, here and under torch.func."""
    model, tasks = network(), batch()
    update = learned("chain", model)
    update.updates[0].a.requires_grad_(False)
    options = {"steps": STEPS, "adapt_update": True}
    expected = MAML(model, update=update, lr=LR, **options)(tasks)
    for way in (ByTask, AtOnce, Mapped):
        got = way(model, update, **options)(tasks)
        close(got.query_losses, expected.query_losses)


@pytest.mark.parametrize("adapt_update", [False, True])
def test_a_cut_changes_no_value_and_ends_the_graph(adapt_update):
    model, update, x, y = parts(per_step=6)
    ends = []
    for every in (100, 1, 2):
        params, state = list(model.parameters()), None
        for number in range(1, 7):
            loss = error_of(model, dict(zip(update.packing.names, params)), x, y)
            params, state = update.step(loss, params, state, lr=0.1, adapt_update=adapt_update)
            if number % every == 0:
                params, state = state.detached(params)
                assert all(p.is_leaf and p.requires_grad for p in params)
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-12, atol=1e-12)

    def cut_within(x, y):
        params, state = dict(model.named_parameters()), None
        for _ in range(6):
            grads = grad(partial(error_of, model))(params, x, y)
            params, state = update.step(grads, params, state, lr=0.1, adapt_update=adapt_update)
            params, state = state.detached(params)
        return list(params.values())

    mapped = vmap(cut_within)(torch.stack([x, x]), torch.stack([y, y]))
    torch.testing.assert_close([p[1] for p in mapped], ends[0], rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in mapped)


def test_the_gradient_back_to_a_cut_equals_plain_torch():
    model, update, x, y = parts()
    names, rule = update.packing.names, plain_kfo(psd=False)
    params, state = dict(model.named_parameters()), None
    losses, phi, last = [], list(update.phi), None
    # The long way: phi by a second derivative of the loss, with the parameters in its graph.
    theta = list(model.parameters())
    for number in range(4):
        if number == 2:
            params, state = state.detached(params)
            cut = list(params.values())
            phi, last = [X.detach().requires_grad_() for X in phi], [X.detach() for X in last]
            start = [X.detach().requires_grad_() for X in theta]
            U = rule(phi, last)
            theta = [X - LR * (u - u.detach()) for X, u in zip(start, U)]
        params, state = update.step(error_of(model, params, x, y), params, state, lr=LR, adapt_update=True)
        loss = error_of(model, dict(zip(names, theta)), x, y)
        grads = torch.autograd.grad(loss, theta, create_graph=True)
        if number:
            inner = torch.autograd.grad(loss, phi, create_graph=True)
            phi = [X - LR * dX for X, dX in zip(phi, inner)]
        last = list(grads)
        theta = [X - LR * u for X, u in zip(theta, rule(phi, last))]
    losses = [error_of(model, params, x, y), error_of(model, dict(zip(names, theta)), x, y)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    # The update's own meta-parameters are behind the cut.
    assert torch.autograd.grad(losses[0], update.phi, allow_unused=True, retain_graph=True) == (None, None)
    found, expected = torch.autograd.grad(losses[0], cut), torch.autograd.grad(losses[1], start)
    close(found, expected)


@pytest.mark.parametrize("make", [KFO, MetaSGD])
@pytest.mark.parametrize("order", ["moved after the cut", "moved before the cut", "never cut"])
def test_an_adapted_phi_keeps_its_values_while_the_update_learns(make, order):
    model, _, x, y = parts()
    moving = make(model.named_parameters())
    still = copy.deepcopy(moving)
    ends = []
    for update in (still, moving):
        params, state = dict(model.named_parameters()), None
        params, state = update.step(error_of(model, params, x, y), params, state, lr=LR, adapt_update=True)
        if order == "moved after the cut":
            params, state = state.detached(params)
        if update is moving:
            with torch.no_grad():
                for row in update.parameters():
                    row.mul_(1.5)
        if order == "moved before the cut":
            params, state = state.detached(params)
        for _ in range(2):
            params, state = update.step(error_of(model, params, x, y), params, state, lr=LR, adapt_update=True)
        ends.append([p.detach() for p in params.values()])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"adapt_update": True}, {"adapt_update": True, "first_order": True}], ids=str)
def test_memory_of_an_endless_loop_stays_constant(options):
    model, update, x, y = parts()

    def alive(steps: int, every: int) -> list[int]:
        params, state, found = dict(model.named_parameters()), None, []
        for number in range(1, steps + 1):
            loss = mse_loss(Counted.apply(functional_call(model, params, (x,))), y)
            params, state = update.step(loss, params, state, lr=0.01, **options)
            del loss
            found.append(len(Counted.nodes))
            if number % every == 0:
                params, state = state.detached(params)
        return found

    cut = alive(200, 5)
    assert cut[5:] == cut[:5] * 39
    grown = alive(20, 100)
    assert grown[-1] > grown[9] > grown[4] or options.get("first_order")


def after(model, update, x, y, **options) -> tuple[dict[str, Tensor], object]:
    """Parameters and state after the first step."""
    params = dict(model.named_parameters())
    return update.step(error_of(model, params, x, y), params, lr=0.1, **options)


def test_without_adaptation_loops_are_free():
    """Another rate, changed parameters, meta-parameters in the loss: each step is the update's alone."""
    model, update, x, y = parts()
    params, state = after(model, update, x, y)
    params = {name: 0.9 * p for name, p in params.items()}
    loss = error_of(model, params, x, y) + 0.1 * update.phi[0].square().sum()
    moved, _ = update.step(loss, params, state, lr=0.3)
    updates = update(error_of(model, params, x, y), params)
    torch.testing.assert_close(moved, {name: p - 0.3 * updates[name] for name, p in params.items()})
    with torch.no_grad():
        grads = grad(partial(error_of, model))(params, x, y)
        again, _ = update.step(grads, params, state, lr=0.3)
    torch.testing.assert_close(again, moved, rtol=1e-12, atol=1e-12)


def test_what_the_gradient_of_phi_does_not_allow():
    model, update, x, y = parts()
    params, state = after(model, update, x, y, adapt_update=True)
    loss = error_of(model, params, x, y)
    step = partial(update.step, loss, lr=0.1, adapt_update=True)
    with pytest.raises(ValueError, match=r"lr: expected 0\.1 as in the last step, got 0\.2"):
        step(params, state, lr=0.2)
    with pytest.raises(ValueError, match="adapt_update: expected True as in the last step, got False"):
        step(params, state, adapt_update=False)
    plain = after(model, update, x, y)
    with pytest.raises(ValueError, match="adapt_update: expected False as in the last step, got True"):
        step(*plain)
    with pytest.raises(ValueError, match=r"params\['2\.bias'\]: expected what the last step returned.*another tensor"):
        step({**params, "2.bias": 2 * params["2.bias"]}, state)
    with pytest.raises(ValueError, match="another tensor"):
        state.detached({**params, "2.bias": params["2.bias"].clone()})
    with pytest.raises(ValueError, match="loss: depends on phi"):
        held = (error_of(model, params, x, y) + update.phi[1].sum(), params, state)
        update.step(*held, lr=0.1, adapt_update=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"adapt_update: .*under no_grad"):
        step(params, state)
    # What a later step adapts is looked for too.
    params, state = step(params, state)
    held = error_of(model, params, x, y) * (1 + state.last.phi[0].sum())
    with pytest.raises(ValueError, match="loss: depends on phi"):
        update.step(held, params, state, lr=0.1, adapt_update=True)
    # A proximal term holds phi of the steps before alone.
    start = model.get_parameter("0.weight")
    near = error_of(model, params, x, y) + (params["0.weight"] - start).square().sum()
    update.step(near, params, state, lr=0.1, adapt_update=True)
    params, state = state.detached(params)
    with torch.no_grad():
        params["0.weight"].mul_(0.5)
    with pytest.raises(ValueError, match=r"params\['0\.weight'\]: .*changed in place"):
        update.step(error_of(model, params, x, y), params, state, lr=0.1, adapt_update=True)


def test_states_that_do_not_fit():
    model, update, x, y = parts()
    params, state = after(model, update, x, y, adapt_update=True)
    loss = error_of(model, params, x, y)
    other = copy.deepcopy(update)
    with pytest.raises(ValueError, match="state: expected one of this KFO, got one of another update, a KFO"):
        other.step(loss, params, state, lr=0.1, adapt_update=True)
    with pytest.raises(TypeError, match="state: expected what the last step returned, or None, got dict"):
        update.step(loss, params, params, lr=0.1)
    with pytest.raises(TypeError, match=r"params\[0\]: expected a tensor, got int"):
        update.step(loss, [1, 2, 3, 4], lr=0.1)
    with pytest.raises(TypeError, match=r"params\[0\]: .* got tuple: pass dict\(model\.named_parameters\(\)\)"):
        update.step(loss, model.named_parameters(), lr=0.1)
    for wrong in (loss.item(), lambda params: loss, model):
        with pytest.raises(TypeError, match=f"loss: .* got {type(wrong).__name__}: pass the loss itself, computed"):
            update.step(wrong, model.parameters(), lr=0.1)

    def inside(p):
        return update.step(grad(partial(error_of, model))(p, x, y), p, state, lr=0.1, adapt_update=True)[0]

    with pytest.raises(ValueError, match=r"state: expected one of a step in the same torch\.func transform"):
        torch.func.jacrev(inside)(params)
    rates = GradientDescent(list(model.named_parameters()), per_step=1)
    params, state = after(model, rates, x, y)
    with pytest.raises(ValueError, match="step: expected 0 to 0, got 1"):
        rates.step(error_of(model, params, x, y), params, state, lr=0.1)


def test_losses_and_parameters_that_do_not_fit():
    model, update, x, y = parts()
    params = dict(model.named_parameters())
    loss = error_of(model, params, x, y)
    with pytest.raises(ValueError, match="adapt_update: expected an update to adapt, got GradientDescent"):
        GradientDescent(list(model.named_parameters())).step(loss, params, lr=0.1, adapt_update=True)
    with pytest.raises(TypeError, match="lr: expected a number, got Tensor; learned rates"):
        update.step(loss, params, lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"loss: expected a scalar, got shape \(2,\).*'mean'"):
        update.step(torch.stack([loss, loss]), params, lr=0.1)
    wide = {name: p.expand(2, *p.shape) for name, p in params.items()}
    losses = vmap(partial(error_of, model), (0, None, None))(wide, x, y)
    with pytest.raises(ValueError, match=r"loss: expected shape \(2,\), one loss .*got shape \(\); a mean"):
        update.step(losses.mean(), wide, lr=0.1)
    with pytest.raises(ValueError, match=r"loss: .*no graph"):
        update.step(loss.detach(), params, lr=0.1)
    bare = {name: p.detach() for name, p in params.items()}
    with pytest.raises(ValueError, match=r"params\['0\.weight'\]: does not require a gradient"):
        update.step(loss, bare, lr=0.1)
    with pytest.raises(ValueError, match=r"params: expected one tensor for each.*missing '2\.bias'"):
        update.step(loss, {name: p for name, p in params.items() if name != "2.bias"}, lr=0.1)
    with pytest.raises(TypeError, match=r"params: expected torch\.float64 as the meta-parameters have"):
        update.step(loss, [p.float() for p in params.values()], lr=0.1)
    with pytest.raises(ValueError, match=r"loss: expected gradients inside a torch\.func transform, got a loss"):
        grad(lambda p: update.step(error_of(model, p, x, y), p, lr=0.1)[0]["2.bias"].sum())(params)


def test_gradients_that_do_not_fit():
    model, update, x, y = parts()
    params = dict(model.named_parameters())
    grads = grad(partial(error_of, model))(params, x, y)
    moved, _ = update.step(list(grads.values()), params, lr=0.1)
    expected, _ = update.step(error_of(model, params, x, y), params, lr=0.1)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"grads: expected gradients with a graph.*create_graph=True, or say first_or"):
        update.step({name: g.detach() for name, g in grads.items()}, params, lr=0.1)
    with pytest.raises(ValueError, match=r"grads\['2\.bias'\]: expected a gradient, got None; allow_unused=True"):
        update.step({**grads, "2.bias": None}, params, lr=0.1)
    with pytest.raises(ValueError, match="grads: expected at least one gradient"):
        update.step([None] * 4, params, lr=0.1, allow_unused=True)
    with pytest.raises(ValueError, match="params have, without a task dimension, got with a task dimension of 2"):
        update.step({name: torch.stack([g, g]) for name, g in grads.items()}, params, lr=0.1)
    with pytest.raises(TypeError, match=r"grads: expected torch\.float64"):
        update.step({name: g.float() for name, g in grads.items()}, params, lr=0.1)


def test_a_rule_that_reads_itself_is_refused():
    class Wrong(MetaSGD):
        def rule(self, phi, G, step=None):
            return self.a * G

    model, _, x, y = parts()
    update = Wrong(list(model.named_parameters()))
    params, state = after(model, update, x, y, adapt_update=True)
    with pytest.raises(ValueError, match="rule of Wrong does not depend on all of the phi"):
        update.step(error_of(model, params, x, y), params, state, lr=0.1, adapt_update=True)
