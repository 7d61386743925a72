"""MAML and ANIL against hand-written float64 loops: meta-gradients, checkpointing, first order, evaluation, errors."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import omniglot_cnn, sinusoid_mlp
from kfo_ext.tasks import Examples, TaskBatch

DTYPE = torch.float64
WAYS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, WAYS)

    def features(self, x):
        return torch.tanh(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def network() -> nn.Module:
    model = Net().to(DTYPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def random_kfo(parameters, **options) -> KFO:
    kfo = KFO(parameters, **options)
    with torch.no_grad():
        for parameter in kfo.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return kfo


def random_batch(tasks: int = 3, count: int = 6) -> TaskBatch:
    def examples() -> Examples:
        return Examples(torch.randn(tasks, count, 1, 8, 8, dtype=DTYPE), torch.randint(0, WAYS, (tasks, count)))

    return TaskBatch(examples(), examples())


def by_hand(
    call, named, kfo, batch: TaskBatch, *, lr: float, steps: int, adapt_update: bool, first_order: bool = False
) -> torch.Tensor:
    """Algorithm 1 task by task, with the second pass through the model for the factors' gradients."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.support, *batch.query):
        params, phi = dict(named), kfo.phi if kfo is not None else ()
        for step in range(steps):
            loss = cross_entropy(call(params, support_x), support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            if adapt_update and step > 0:
                inner = torch.autograd.grad(loss, phi, create_graph=True)
                phi = tuple(row - lr * grad for row, grad in zip(phi, inner))
            if first_order:
                grads = [grad.detach() for grad in grads]
            if kfo is not None:
                packing = kfo.problems.packing
                grads = packing.unpack(kfo.rule(phi, packing.pack(list(grads))), batched=False)
            params = {name: value - lr * grad for (name, value), grad in zip(params.items(), grads)}
        losses.append(cross_entropy(call(params, query_x), query_y))
    return torch.stack(losses).mean()


def maml_by_hand(model, kfo, batch, **options):
    return by_hand(
        lambda params, x: functional_call(model, params, (x,)), list(model.named_parameters()), kfo, batch, **options
    )


def compare(learner: MAML, batch: TaskBatch, expected: torch.Tensor) -> None:
    parameters = list(learner.parameters())
    actual = learner(batch).loss
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual, parameters)
    for grad, other in zip(grads, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("adapt_update", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        {"psd": True},
        {"psd": False},
        {"psd": False, "bias": True},
        {"hidden_layers": 1, "bias": True},
        {"hidden_layers": 2, "psd": False},
    ],
    ids=str,
)
def test_meta_gradients_equal_the_long_way(setting, adapt_update, steps):
    model, batch = network(), random_batch()
    kfo = random_kfo(model.named_parameters(), **setting)
    options = {"lr": 0.1, "steps": steps, "adapt_update": adapt_update}
    compare(MAML(model, update=kfo, **options), batch, maml_by_hand(model, kfo, batch, **options))


@pytest.mark.parametrize("first_order", [False, True])
def test_plain_maml(first_order):
    model, batch = network(), random_batch()
    options = {"lr": 0.2, "steps": 3, "first_order": first_order}
    compare(MAML(model, **options), batch, maml_by_hand(model, None, batch, adapt_update=False, **options))


@pytest.mark.parametrize("psd", [False, True])
def test_first_order_keeps_the_factors_own_gradients(psd):
    model, batch = network(), random_batch()
    kfo = random_kfo(model.named_parameters(), psd=psd)
    options = {"lr": 0.2, "steps": 3, "first_order": True}
    learner = MAML(model, update=kfo, **options)
    compare(learner, batch, maml_by_hand(model, kfo, batch, adapt_update=False, **options))
    adapted = MAML(model, update=kfo, adapt_update=True, **options)
    grads = torch.autograd.grad(adapted(batch).loss, list(adapted.parameters()))
    others = torch.autograd.grad(learner(batch).loss, list(learner.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert any((grad - other).abs().max() > 1e-6 for grad, other in zip(grads, others))


def test_first_order_with_adapted_factors_by_finite_differences():
    """With the model's gradients held constant nothing is left but U: checked on a model whose gradient is constant."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, dtype=DTYPE))

        def forward(self, x):
            return x @ self.weight.T

    model = Linear()
    kfo = random_kfo(model.named_parameters())
    batch = TaskBatch(*(Examples(*torch.randn(2, 2, 4, 3, dtype=DTYPE).unbind(0)) for _ in range(2)))
    batch = TaskBatch(*(Examples(x, y[..., :2]) for x, y in batch))
    options = {"lr": 0.3, "steps": 3, "adapt_update": True, "loss": lambda out, y: (out * y).sum()}
    results = [MAML(model, update=kfo, first_order=first_order, **options)(batch).loss for first_order in (False, True)]
    wanted = list(kfo.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, wanted) for loss in results)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("setting", [{"psd": True}, {"psd": False, "hidden_layers": 1, "bias": True}], ids=str)
@pytest.mark.parametrize("first_order", [False, True])
def test_checkpointing_is_bit_equal(setting, first_order):
    model, batch = network(), random_batch()
    kfo = random_kfo(model.named_parameters(), **setting)
    grads = []
    for checkpoint in (False, True):
        learner = MAML(
            model, update=kfo, lr=0.1, steps=4, adapt_update=True, first_order=first_order, checkpoint=checkpoint
        )
        grads.append(torch.autograd.grad(learner(batch).loss, list(learner.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("evaluates", [False, True])
def test_an_update_is_evaluated_once_per_step(evaluates, monkeypatch):
    model, batch, calls = network(), random_batch(), []
    kfo = random_kfo(model.named_parameters())
    rule = kfo.rule
    monkeypatch.setattr(kfo, "rule", lambda phi, G: (calls.append(len(G)), rule(phi, G))[1])
    with torch.set_grad_enabled(not evaluates):
        MAML(model, update=kfo, lr=0.1, steps=4, adapt_update=True)(batch)
    assert calls == [3] * 4


def saved_bytes(learner: MAML, batch: TaskBatch) -> int:
    """Bytes that the graph of one meta-loss holds, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner(batch)
    return sum(storages.values())


def test_checkpointing_keeps_memory_constant_in_the_number_of_steps():
    model, batch = omniglot_cnn(2, hidden=8), None
    x = torch.rand(2, 10, 1, 28, 28)
    y = torch.randint(0, 5, (2, 10))
    batch = TaskBatch(Examples(x, y), Examples(x, y))
    kfo = KFO(model.named_parameters())

    def growth(checkpoint: bool) -> float:
        options = {"update": kfo, "lr": 0.1, "adapt_update": True, "checkpoint": checkpoint}
        learners = [MAML(model, steps=steps, **options) for steps in (2, 6)]
        for learner in learners:
            with torch.no_grad():
                # Makes its plan.
                learner(batch)
        few, many = (saved_bytes(learner, batch) for learner in learners)
        return many / few

    assert growth(False) > 2.5
    assert growth(True) < 1.3


@pytest.mark.parametrize("first_order", [False, True])
def test_anil_adapts_the_head_alone(first_order):
    model, batch = network(), random_batch()
    kfo = random_kfo(model.head.named_parameters(), psd=False)
    options = {"lr": 0.3, "steps": 3, "adapt_update": not first_order, "first_order": first_order}
    count = batch.support.x.shape[1]
    features = torch.stack([model.features(torch.cat([s, q])) for s, q in zip(batch.support.x, batch.query.x)])
    inner = TaskBatch(Examples(features[:, :count], batch.support.y), Examples(features[:, count:], batch.query.y))
    expected = by_hand(
        lambda params, x: functional_call(model.head, params, (x,)),
        list(model.head.named_parameters()),
        kfo,
        inner,
        **options,
    )
    compare(ANIL(model, update=kfo, **options), batch, expected)


@pytest.mark.parametrize("method", [MAML, ANIL])
def test_evaluation_gives_the_same_numbers_and_keeps_no_graph(method):
    model, batch = network(), random_batch()
    kfo = random_kfo((model if method is MAML else model.head).named_parameters())
    learner = method(model, update=kfo, lr=0.1, steps=3, adapt_update=True)
    trained = learner(batch)
    with torch.no_grad():
        result = learner(batch)
    assert not result.loss.requires_grad
    for a, b in zip(result, trained):
        torch.testing.assert_close(a, b.detach())
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_nothing_leaks():
    model, batch = network(), random_batch()
    learner = MAML(model, update=random_kfo(model.named_parameters()), lr=0.1, steps=2, adapt_update=True)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    def round_trip() -> None:
        for _ in range(10):
            learner(batch).loss.backward()
            learner.zero_grad()
            with torch.no_grad():
                learner(batch)
            learner(batch)

    round_trip()
    before = tensors()
    round_trip()
    assert tensors() <= before


def test_result_has_losses_and_accuracies():
    model, batch = network(), random_batch()
    result = MAML(model, lr=0.1, steps=2)(batch)
    assert result.support_losses.shape == (2, 3)
    assert result.query_losses.shape == result.metrics.shape == (3,)
    torch.testing.assert_close(result.query_losses.mean(), result.loss.detach())
    expected = torch.stack([cross_entropy(model(x), y) for x, y in zip(*batch.support)])
    torch.testing.assert_close(result.support_losses[0], expected.detach())


def test_regression_has_no_accuracy():
    model = sinusoid_mlp().to(DTYPE)
    x = torch.randn(2, 5, 1, dtype=DTYPE)
    batch = TaskBatch(Examples(x, x.sin()), Examples(x, x.sin()))
    result = MAML(model, lr=0.01, steps=1, loss=nn.functional.mse_loss)(batch)
    assert result.metrics is None


def test_parameters_of_any_shape_adapt_without_a_learned_update():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(12, WAYS)).to(DTYPE)
    x, y = torch.randn(2, 4, 1, 8, dtype=DTYPE), torch.randint(0, WAYS, (2, 4))
    batch = TaskBatch(Examples(x, y), Examples(x, y))
    compare(MAML(model, lr=0.1, steps=2), batch, maml_by_hand(model, None, batch, lr=0.1, steps=2, adapt_update=False))


def test_statistics_never_cross_tasks():
    model, batch = network(), random_batch(tasks=2)
    learner = MAML(model, lr=0.1, steps=2)
    alone = learner(TaskBatch(*(Examples(part.x[:1], part.y[:1]) for part in batch)))
    assert torch.equal(learner(batch).query_losses[:1], alone.query_losses)


def test_non_finite_losses_name_step_and_task():
    model, batch = network(), random_batch()
    batch.support.x[1] = float("nan")
    with pytest.raises(FloatingPointError, match="the support loss of step 1 of task 1 is nan"):
        MAML(model, lr=0.1, steps=2)(batch).check_finite()
    batch = random_batch()
    batch.query.x[2, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="the query loss of task 2 is nan"):
        MAML(model, lr=0.1, steps=2)(batch).check_finite()


def test_unused_and_frozen_parameters():
    model, batch = network(), random_batch()
    model.spare = nn.Linear(2, 2).to(DTYPE)
    kfo = random_kfo(model.named_parameters(), bias=True)
    with pytest.raises(ValueError, match=r"'spare\.weight'.*allow_unused=True"):
        MAML(model, update=kfo, lr=0.1, steps=1)(batch)
    result = MAML(model, update=kfo, lr=0.1, steps=2, adapt_update=True, allow_unused=True)(batch)
    del model.spare
    smaller = KFO(model.named_parameters(), bias=True)
    with torch.no_grad():
        for layer, other in zip(smaller.layers, kfo.layers):
            for mine, theirs in zip(layer.phi, other.phi):
                mine.copy_(theirs[:, : mine.shape[1]])
    expected = MAML(model, update=smaller, lr=0.1, steps=2, adapt_update=True)(batch)
    torch.testing.assert_close(result.loss, expected.loss)

    model.conv.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'conv\.bias'.*allow_nograd=True"):
        MAML(model, lr=0.1, steps=1)
    frozen = MAML(model, lr=0.1, steps=1, allow_nograd=True)
    frozen(batch).loss.backward()
    assert "conv.bias" not in frozen.packing.names
    assert model.conv.bias.grad is None


def test_a_parameter_used_at_some_steps_only():
    """What a step did not use did not move theta, so it must not move the factors at the next step either."""

    class Alternating(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, WAYS)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            features = self.features(x)
            return self.head(features) + (self.spare(features) if self.calls % 2 == 0 else 0)

    torch.manual_seed(0)
    model, batch = Alternating().to(DTYPE), random_batch(tasks=1)
    kfo = random_kfo(model.named_parameters(), bias=True)
    options = {"lr": 0.1, "steps": 4, "adapt_update": True}
    actual = MAML(model, update=kfo, allow_unused=True, **options)(batch).loss

    model.calls = 0
    params, phi, packing = dict(model.named_parameters()), kfo.phi, kfo.problems.packing
    for step in range(4):
        loss = cross_entropy(functional_call(model, params, (batch.support.x[0],)), batch.support.y[0])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
        if step:
            inner = torch.autograd.grad(loss, phi, create_graph=True)
            phi = tuple(row - 0.1 * grad for row, grad in zip(phi, inner))
        updates = packing.unpack(kfo.rule(phi, packing.pack(list(grads))), batched=False)
        params = {
            name: value if grad is None else value - 0.1 * update
            for (name, value), grad, update in zip(params.items(), grads, updates)
        }
    expected = cross_entropy(functional_call(model, params, (batch.query.x[0],)), batch.query.y[0])
    torch.testing.assert_close(actual, expected)
    wanted = [*model.parameters(), *kfo.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True) for loss in (actual, expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [["L"], ["R", "L"]], ids=str)
def test_frozen_factors_stay_as_they_are(frozen):
    model, batch = network(), random_batch()
    kfo = random_kfo(model.named_parameters(), psd=False)
    for name in frozen:
        getattr(kfo.layers[0], name).requires_grad_(False)
    learner = MAML(model, update=kfo, lr=0.1, steps=3, adapt_update=True)
    result = learner(batch)
    result.loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(learner(batch).loss, result.loss.detach())
    assert kfo.layers[0].L.grad is None
    assert (kfo.layers[0].R.grad is None) == ("R" in frozen)


def test_a_parameter_frozen_later_is_named():
    model = network()
    learner = MAML(model, lr=0.1, steps=1)
    model.conv.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter 'conv\.bias' was frozen after the learner was built"):
        learner(random_batch())


def test_a_loss_that_is_no_scalar_is_refused():
    learner = MAML(network(), lr=0.1, steps=1, loss=lambda out, y: cross_entropy(out, y, reduction="none"))
    with pytest.raises(ValueError, match=r"loss: expected a scalar per task, got shape \(6,\).*'mean'"):
        learner(random_batch())


def test_an_update_for_other_names_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kfo = KFO(list(model.named_parameters())[::-1])
    with pytest.raises(ValueError, match="update: expected factors for parameter"):
        MAML(model, update=kfo, lr=0.1, steps=1)
    MAML(model, update=KFO(model.parameters()), lr=0.1, steps=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number"),
        ({"steps": 0}, ValueError, "steps: expected an integer of at least 1, got 0"),
        ({"adapt_update": True}, ValueError, "adapt_update: expected an update to adapt"),
        ({"update": "kfo"}, TypeError, r"update: expected an Update, such as KFO\(.*\), or None, got str"),
        ({"update": KFO([torch.ones(3)])}, ValueError, "update: expected one made for 6 parameters, got one for 1"),
        ({"update": KFO([torch.ones(3)] * 6)}, ValueError, "update: expected factors for parameter 'conv.weight'"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MAML(network(), **{"lr": 0.1, "steps": 1, **options})


def test_bad_models_and_batches():
    with pytest.raises(
        TypeError, match=r"model: expected a module with a method features\(x\) and a submodule named head"
    ):
        ANIL(nn.Linear(2, 2), lr=0.1, steps=1)
    with pytest.raises(ValueError, match="model: expected at least one parameter"):
        MAML(nn.ReLU(), lr=0.1, steps=1)
    learner, batch = MAML(network(), lr=0.1, steps=1), random_batch()
    with pytest.raises(ValueError, match="batch: expected at least one task"):
        learner(TaskBatch(*(Examples(part.x[:0], part.y[:0]) for part in batch)))
    with pytest.raises(ValueError, match=r"batch\.query\.y: expected"):
        learner(TaskBatch(batch.support, Examples(batch.query.x, batch.query.y[:2])))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        learner(batch)


def test_running_statistics_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, WAYS)).to(DTYPE)
    MAML(model, lr=0.1, steps=1)(random_batch())
    with pytest.raises(RuntimeError, match="BatchNorm2d '1' would use running statistics"):
        MAML(model.eval(), lr=0.1, steps=1)(random_batch())
