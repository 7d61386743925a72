"""What a learner refuses, by name: statistics that mix tasks, a network changed since, options, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch

OPTIONS = {"lr": 0.1, "steps": 1}


def images(channels: int = 2, size: int = 4, count: int = 4, tasks: int = 2, dtype=torch.float32) -> TaskBatch:
    def examples() -> Examples:
        return Examples(
            torch.randn(tasks, count, channels, size, size, dtype=dtype), torch.randint(0, 3, (tasks, count))
        )

    return TaskBatch(examples(), examples())


def network(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(32, 3))


def switched_off() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.track_running_stats = False
    return norm.eval()


class OwnNorm(nn.Module):
    """Normalises as batch norm does, without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


RUNNING = {
    "usual": lambda: nn.BatchNorm2d(2).eval(),
    "switched off later": switched_off,
    "instance": lambda: nn.InstanceNorm2d(2, track_running_stats=True).eval(),
    "own": lambda: OwnNorm().eval(),
    "sync": lambda: nn.SyncBatchNorm(2).eval(),
}


@pytest.mark.parametrize("learner", [MAML, ANIL])
@pytest.mark.parametrize("kind", RUNNING)
def test_running_statistics_are_refused(kind, learner):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = RUNNING[kind](), nn.Linear(32, 3)

        def features(self, x):
            return self.norm(x).flatten(1)

        def forward(self, x):
            return self.head(self.features(x))

    kfo_ext_learner = learner(Net(), allow_unused=True, **OPTIONS)
    with pytest.raises(
        RuntimeError, match=r"'norm' would use running statistics, which mix tasks: .* or call train\(\)"
    ):
        kfo_ext_learner(images())


@pytest.mark.parametrize("route", ["auto", "loop"])
def test_one_value_per_channel_is_refused(route):
    model = CNN(1, in_channels=1, hidden=4, ways=3, image_size=1)
    with pytest.raises(ValueError, match=r"more than 1 value per channel|expected at least 2 rows"):
        MAML(model, route=route, **OPTIONS)(images(channels=1, size=1, count=1))


def _append(model):
    model.append(nn.Linear(3, 3))


def _unfreeze(model):
    model[0].requires_grad_(True)


def _wider(model):
    model[2].weight = nn.Parameter(torch.randn(5, 4))


def _gone(model):
    model[2] = nn.Identity()


def _frozen(model):
    model[2].bias.requires_grad_(False)


def _renamed(model):
    layer = model[2]
    model[2] = nn.Sequential(layer)


CHANGES = {
    "appended": (_append, r"parameter '(head\.)?3\.weight' was added or made trainable"),
    "unfrozen": (_unfreeze, r"parameter '(head\.)?0\.weight' was added or made trainable"),
    "wider": (_wider, r"parameter '(head\.)?2\.weight' had shape \(3, 4\) and got \(5, 4\)"),
    "gone": (_gone, r"parameter '(head\.)?2\.weight' was removed or renamed"),
    "frozen": (_frozen, r"parameter '(head\.)?2\.bias' was frozen"),
    "renamed": (_renamed, r"parameter '(head\.)?2\.weight' was removed or renamed"),
}


@pytest.mark.parametrize("learner", ["maml", "anil"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_changed_since_is_refused(change, learner):
    head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    head[0].requires_grad_(False)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Linear(4, 4), head

    learner = (
        MAML(head, allow_nograd=True, **OPTIONS) if learner == "maml" else ANIL(Net(), allow_nograd=True, **OPTIONS)
    )
    x, y = torch.randn(2, 4, 4), torch.randint(0, 3, (2, 4))
    batch = TaskBatch(Examples(x, y), Examples(x, y))
    learner(batch)
    change, message = CHANGES[change]
    change(head)
    with pytest.raises(ValueError, match=message + r".* after the learner was built: build it again"):
        learner(batch)


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (
            nn.Parameter(torch.tensor(0.1)),
            TypeError,
            "lr: expected a number, got Parameter; learned rates are those of an update, such as MetaSGD",
        ),
        (torch.tensor(0.1), TypeError, "lr: expected a number, got Tensor; learned rates"),
        ([0.1, 0.2], TypeError, "lr: expected a number, got list; learned rates"),
        ("0.1", TypeError, "lr: expected a number, got str"),
        (True, TypeError, "lr: expected a number, got bool"),
        (None, TypeError, "lr: expected a number, got NoneType$"),
        (float("inf"), ValueError, "lr: expected a finite number of at least 0, got inf"),
    ],
    ids=str,
)
def test_rates_that_are_no_number(lr, error, message):
    with pytest.raises(error, match=message):
        MAML(nn.Linear(4, 3), lr=lr, steps=1)


def test_a_rate_beyond_the_numbers_of_the_parameters_is_refused():
    head, batch = nn.Linear(4, 3), TaskBatch(GOOD, GOOD)
    message = r"lr: expected at most 3\.4e\+38, the largest number of torch\.float32, got 1e\+39"
    with pytest.raises(ValueError, match=message):
        MAML(head, lr=1e39, steps=1)(batch)
    with pytest.raises(ValueError, match=message):
        KFO(head.named_parameters()).step(head(X[0]).sum(), dict(head.named_parameters()), lr=1e39)


def test_a_number_of_any_kind_is_a_rate():
    assert MAML(nn.Linear(4, 3), lr=np.float32(0.5), steps=1).lr == 0.5


X, Y = torch.randn(2, 4, 4), torch.randint(0, 3, (2, 4))
GOOD = Examples(X, Y)
BATCHES = {
    "list": (
        [GOOD, GOOD],
        r"batch: expected TaskBatch\(Examples\(x, y\), Examples\(x, y\)\) of kfo_ext\.tasks, .* got list",
    ),
    "tuple": ((GOOD, GOOD), "batch: expected TaskBatch.*, got tuple"),
    "tasks": ([TaskBatch(GOOD, GOOD)] * 2, "batch: expected TaskBatch.*, got list"),
    "part": (TaskBatch(GOOD, (X, Y)), r"batch\.query: expected Examples\(x, y\), got tuple"),
    "none": (TaskBatch(None, GOOD), r"batch\.support: expected Examples\(x, y\), got NoneType"),
    "array": (TaskBatch(Examples(X.numpy(), Y), GOOD), r"batch\.support\.x: expected a tensor .*, got ndarray"),
    "ragged": (TaskBatch(Examples(list(X), Y), GOOD), r"batch\.support\.x: .* got list; .*torch\.stack joins"),
    "no labels": (TaskBatch(GOOD, Examples(X, None)), r"batch\.query\.y: expected a tensor .*, got NoneType"),
    "two inputs": (TaskBatch(Examples((X, X), Y), GOOD), r"batch\.support\.x: expected a tensor .*, got tuple"),
    "counts": (TaskBatch(Examples(X, Y[:, :1]), GOOD), r"batch\.support\.y: expected \(2 tasks, 4 examples"),
    "no task": (TaskBatch(GOOD, Examples(X[0], Y[0])), r"batch\.query\.x: expected \(2 tasks, .* x\[None\]"),
    "sparse": (TaskBatch(Examples(X.to_sparse(), Y), GOOD), r"batch\.support\.x: expected a dense tensor"),
    "scalar": (TaskBatch(Examples(X[0, 0, 0], Y), GOOD), r"batch\.support\.x: expected .* got shape \(\)"),
    "double": (
        TaskBatch(Examples(X.double(), Y), GOOD),
        r"batch\.support\.x: expected torch\.float32 .*got torch\.float64",
    ),
    "half query": (
        TaskBatch(GOOD, Examples(X.half(), Y)),
        r"batch\.query\.x: expected torch\.float32 .*got torch\.float16",
    ),
}


@pytest.mark.parametrize("route", ["auto", "loop"])
@pytest.mark.parametrize("kind", BATCHES)
def test_batches_that_are_refused(kind, route):
    batch, message = BATCHES[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        MAML(nn.Linear(4, 3), route=route, **OPTIONS)(batch)


def test_a_batch_on_another_device_is_named():
    with pytest.raises(TypeError, match=r"batch\.query\.x: expected device cpu .*got meta"):
        MAML(nn.Linear(4, 3), route="loop", **OPTIONS)(TaskBatch(GOOD, Examples(X.to("meta"), Y)))


def test_a_model_that_converts_its_input_takes_it():
    class Converting(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    batch = TaskBatch(Examples(X.double(), Y), GOOD)
    assert MAML(Converting(4, 3), **OPTIONS)(batch).loss.isfinite()


def test_an_error_of_the_model_is_its_own():
    class Failing(nn.Linear):
        def forward(self, x):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        MAML(Failing(4, 3), **OPTIONS)(TaskBatch(GOOD, GOOD))


def test_models_updates_and_losses_that_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"expected one made for 4 .* got one for 2; missing: 0\.weight, 0\.bias"):
        MAML(model, update=KFO(list(model.named_parameters())[2:]), **OPTIONS)
    with pytest.raises(ValueError, match=r"got one for 2: the adapted parameters are 0\.weight, 0\.bias, 1\.weight"):
        MAML(model, update=KFO(model[1].parameters()), **OPTIONS)
    with pytest.raises(TypeError, match=r"loss: expected a function of .* or None, got 'mse'"):
        MAML(model, loss="mse", **OPTIONS)
    model[1].double()
    with pytest.raises(
        TypeError, match=r"one dtype, got '0\.weight' of torch\.float32 and '1\.weight' of torch\.float64"
    ):
        MAML(model, **OPTIONS)
    with pytest.raises(TypeError, match="loss: expected a function of"):
        MAML(model[0], loss=nn.MSELoss, **OPTIONS)
    with pytest.raises(TypeError, match="model: expected a module, got <class"):
        MAML(nn.Linear, **OPTIONS)
    halves = MAML(nn.Linear(4, 3).double(), update=KFO(nn.Linear(4, 3).parameters()), **OPTIONS)
    with pytest.raises(TypeError, match=r"update: expected torch\.float64 as the parameters have, got torch\.float32"):
        halves(TaskBatch(Examples(X.double(), Y), Examples(X.double(), Y)))
    model[1].to("meta", torch.float32)
    with pytest.raises(ValueError, match=r"one device, got '0\.weight' on cpu and '1\.weight' on meta"):
        MAML(model, **OPTIONS)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.classifier = nn.Linear(4, 4), nn.Linear(4, 3)

    with pytest.raises(
        TypeError, match=r"features\(x\) and a submodule named head, got Classifier with encoder, class"
    ):
        ANIL(Classifier(), **OPTIONS)


def test_a_route_by_name_never_falls_back():
    model = nn.Linear(4, 3)
    learner = MAML(model, route="vmap", **OPTIONS)
    learner(TaskBatch(GOOD, GOOD))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="route: expected a network that vmap can serve: Linear has a hook"):
        learner(TaskBatch(GOOD, GOOD))


def test_a_route_by_name_names_the_function():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.cell(x))

    with pytest.raises(ValueError, match=r"route: expected a network that vmap can serve: torch\.gru_cell has no"):
        MAML(Recurrent(), route="vmap", **OPTIONS)(TaskBatch(GOOD, GOOD))


def _double_head(model):
    model[2].double()


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model[2])


def _frozen_where_shared(model):
    model[0].requires_grad_(False)


def _no_parameter(model):
    weight = model[2].weight
    del model[2].weight
    model[2].weight = weight.detach()


STATES = {
    "dtype of a part": (
        _double_head,
        TypeError,
        r"parameters\['2\.weight'\]: expected torch\.float32 as '0\.weight'",
    ),
    "parametrized": (
        _parametrized,
        ValueError,
        r"parameter '2\.weight' was removed or renamed after the learner",
    ),
    "frozen where shared": (_frozen_where_shared, ValueError, r"parameter '0\.weight' was frozen after the learner"),
    "no parameter": (_no_parameter, ValueError, r"parameter '2\.weight' was removed or renamed after the learner"),
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_changed_since_is_refused(change):
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer, nn.Linear(4, 3))
    learner = MAML(model, **OPTIONS)
    adapted = learner.adapt(GOOD)
    function, error, message = STATES[change]
    function(model)
    with pytest.raises(error, match=message):
        learner(TaskBatch(GOOD, GOOD))
    with pytest.raises(error, match=message):
        learner.adapt(GOOD)
    if error is ValueError:
        for use in (lambda: adapted.predict(X), adapted.module):
            with pytest.raises(ValueError, match=message):
                use()


def _assigned(model):
    model[2].weight = nn.Parameter(torch.randn(3, 4))


def _replaced(model):
    model[2] = nn.Linear(4, 3)


def _doubled(model):
    model.double()


def _buffered(model):
    model[2].register_buffer("scale", torch.ones(3))


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("change", [_assigned, _replaced, _doubled, _buffered])
def test_a_network_of_the_same_structure_is_followed(change, route):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    learner, batch = MAML(model, adapted=["2.*"], route=route, **OPTIONS), TaskBatch(GOOD, GOOD)
    learner(batch)
    change(model)
    batch = batch.to(dtype=model[0].weight.dtype)
    results = [each(batch) for each in (learner, MAML(model, adapted=["2.*"], route=route, **OPTIONS))]
    gradients = [torch.autograd.grad(result.loss, list(model.parameters())) for result in results]
    for a, b in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        assert torch.equal(a, b)


def test_a_head_that_is_gone_is_named():
    model = nn.Module()
    model.features, model.head = nn.Linear(4, 4), nn.Linear(4, 3)
    learner = ANIL(model, **OPTIONS)
    model.head = nn.Linear(4, 3)
    learner(TaskBatch(GOOD, GOOD))
    del model.head
    with pytest.raises(ValueError, match="module 'head' was removed or renamed after the learner was built"):
        learner(TaskBatch(GOOD, GOOD))
