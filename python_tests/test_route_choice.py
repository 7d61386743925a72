"""Which route a learner takes and why, and that a plan which no longer holds gives no wrong number."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plain_maml import assert_equal_truth, plain_maml
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfo_ext import ANIL, MAML
from kfo_ext.adapt.planned import planned_route
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3


def cnn() -> CNN:
    torch.manual_seed(0)
    return CNN(2, in_channels=1, hidden=5, ways=WAYS, image_size=9, stride=2).double()


def images() -> TaskBatch:
    def examples(count: int) -> Examples:
        x = torch.randn(TASKS, count, 1, 9, 9, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count)))

    return TaskBatch(examples(6), examples(4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, WAYS)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Storing(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Listing(nn.Linear):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class Noting(nn.Linear):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.calls = {"n": 0}

    def forward(self, x):
        self.calls["n"] += 1
        return super().forward(x)


class Counting(nn.Linear):
    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else 2 * y


class Answering(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x), "name": "linear"}


def hooked() -> nn.Module:
    linear = nn.Linear(4, WAYS)
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return linear


# network: (what its input looks like, why it goes task by task)
LOOPS = {
    "recurrent": (Recurrent, (6, 3, 4), "torch.lstm has no verified rule"),
    "storing": (lambda: Storing(4, WAYS), (6, 4), "its forward sets Storing.last"),
    "listing": (lambda: Listing(4, WAYS), (6, 4), "its forward sets Listing.seen"),
    "noting": (lambda: Noting(4, WAYS), (6, 4), "its forward sets Noting.calls"),
    "counting": (lambda: Counting(4, WAYS), (6, 4), "changes a tensor that all tasks share"),
    "branching": (lambda: Branching(4, WAYS), (6, 4), "its forward reads the values of a tensor (__bool__)"),
    "answering": (lambda: Answering(4, WAYS), (6, 4), "its output is not of tensors alone"),
    "hook": (hooked, (6, 4), "Linear has a hook"),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_network_that_vmap_cannot_serve_says_why(kind):
    make, shape, reason = LOOPS[kind]
    model = make().double()
    x, y = torch.randn(TASKS, *shape, dtype=torch.float64), torch.randint(0, WAYS, (TASKS, 6))
    batch = TaskBatch(Examples(x, y), Examples(x + 1, y))

    def loss(output, y):
        return nn.functional.cross_entropy(output["logits"] if isinstance(output, dict) else output, y)

    learner = MAML(model, lr=0.1, steps=2, loss=loss)
    assert learner.route == "auto"
    buffers = copy.deepcopy(dict(model.named_buffers()))
    assert_equal_truth(learner, batch, plain_maml(copy.deepcopy(model), batch, loss, lr=0.1, steps=2))
    assert learner.route.startswith("loop: ")
    assert reason in learner.route
    for name, buffer in model.named_buffers():
        assert buffer == buffers[name] + TASKS * 3, "as many calls as the loop makes"
    with pytest.raises(ValueError, match=r"route: expected a network that vmap can serve: "):
        MAML(model, lr=0.1, steps=2, loss=loss, route="vmap")(batch)


class Indexed(nn.Module):
    def __init__(self, one_hot: bool) -> None:
        super().__init__()
        self.words, self.head, self.one_hot = nn.Embedding(7, 4), nn.Linear(7 if one_hot else 4, WAYS), one_hot

    def forward(self, x):
        if self.one_hot:
            return self.head(nn.functional.one_hot(x, 7).to(self.head.weight.dtype).mean(1))
        return self.head(self.words(x).mean(1))


@pytest.mark.parametrize("index", [7, -1])
@pytest.mark.parametrize("one_hot", [False, True], ids=["embedding", "one_hot"])
@pytest.mark.parametrize("part", [0, 1], ids=["support", "query"])
def test_an_index_out_of_range_raises_as_in_torch(part, one_hot, index):
    x, y = torch.randint(0, 7, (2, TASKS, 6, 3)), torch.randint(0, WAYS, (TASKS, 6))
    learner = MAML(Indexed(one_hot), lr=0.1, steps=1, allow_unused=True)
    learner(TaskBatch(Examples(x[0], y), Examples(x[1], y)))
    assert learner.route == "vmap"
    x[part, 1, 0, 0] = index
    with pytest.raises((IndexError, RuntimeError)):
        learner(TaskBatch(Examples(x[0], y), Examples(x[1], y)))


class Branchy(nn.Module):
    """The output of batch norm goes to ReLU alone, or elsewhere too."""

    def __init__(self, branch) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, WAYS)
        self.branch, self.options = branch, {"skip": False}

    def forward(self, x):
        h = self.norm(self.conv(x))
        return self.head(self.branch(self, x, h, torch.relu(h)).mean((2, 3)))


def test_support_and_query_may_be_computed_otherwise():
    model = Branchy(lambda self, x, h, r: r + h if len(x) < 5 else r).double()
    batch = images()
    truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2)
    assert_equal_truth(MAML(model, lr=0.1, steps=2, route="vmap"), batch, truth)


def test_what_changed_unseen_since_the_plan_raises():
    model = Branchy(lambda self, x, h, r: r + h if self.options["skip"] else r).double()
    learner, batch = MAML(model, lr=0.1, steps=2), images()
    learner(batch)
    model.options["skip"] = True
    with pytest.raises(RuntimeError, match="route: its forward is not the same in each call"):
        learner(batch)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_a_function_that_torch_does_not_report_reads_no_wrong_number():
    @torch.jit.script
    def swish(x):
        return x * torch.sigmoid(x)

    model = Branchy(lambda self, x, h, r: r + swish(h)).double()
    result = MAML(model, lr=0.1, steps=2)(images())
    assert result.query_losses.isnan().all()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, WAYS), nn.BatchNorm1d(4, momentum=0.3)

    def forward(self, x):
        return self.second(self.norm(torch.tanh(self.norm(self.first(x)))))


class Reading(Twice):
    def forward(self, x):
        return super().forward(x + self.norm.running_mean)


class Doubled(torch.autograd.Function):
    """Has no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Failing(Twice):
    def forward(self, x):
        return Doubled.apply(super().forward(x))


@pytest.mark.parametrize(("make", "route"), [(Twice, "vmap"), (Reading, "loop"), (Failing, "loop")])
def test_running_statistics_follow_the_order_of_a_loop(make, route):
    x, y = torch.randn(TASKS, 6, 4, dtype=torch.float64), torch.randint(0, WAYS, (TASKS, 6))
    batch, model = TaskBatch(Examples(x, y), Examples(x + 1, y)), make().double()
    found = []
    for how in ("auto", "loop"):
        own = copy.deepcopy(model)
        learner = MAML(own, lr=0.1, steps=2, route=how)
        result = learner(batch)
        assert learner.route.startswith(route if how == "auto" else "loop")
        found.append([result.loss.detach(), *own.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_one_task_is_as_one_of_several():
    class Squeezing(nn.Linear):
        def forward(self, x):
            return (2 * super().forward(x)).squeeze_()

    model = Squeezing(4, 1).double()
    x, y = torch.randn(1, 5, 4, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    batch, mse = TaskBatch(Examples(x, y), Examples(x + 1, y)), nn.functional.mse_loss
    learner = MAML(model, lr=0.1, steps=2, loss=mse)
    assert_equal_truth(learner, batch, plain_maml(model, batch, mse, lr=0.1, steps=2))
    assert learner.adapt((x[0], y[0])).predict(x[0]).shape == (5,)


def test_the_route_follows_what_is_done_to_the_network():
    model = cnn()
    learner, batch = MAML(model, lr=0.1, steps=1), images()
    learner(batch)
    assert learner.route == "vmap"
    handle = model.head.register_forward_hook(lambda *_: None)
    learner(batch)
    assert learner.route == "loop: Linear 'head' has a hook"
    handle.remove()
    learner(batch)
    assert learner.route == "vmap"
    both_parts = ANIL(model, lr=0.1, steps=1)
    both_parts(batch)
    assert both_parts.route == "vmap"
    model.blocks[0].register_forward_hook(lambda *_: None)
    both_parts(batch)
    assert both_parts.route == "body: loop: Block 'model.blocks.0' has a hook, head: vmap"


def test_a_network_set_otherwise_is_planned_anew():
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, WAYS)
            self.relu = True

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.head((torch.relu(x) if self.relu else torch.tanh(x)).mean((2, 3)))

    model, batch = Switched().double(), images()
    learner = MAML(model, lr=0.1, steps=2)
    copied = pickle.loads(pickle.dumps(MAML(cnn(), lr=0.1, steps=2)))
    assert copied(batch).loss.isfinite()
    for model.relu in (True, False, True):
        truth = plain_maml(model, batch, nn.functional.cross_entropy, lr=0.1, steps=2)
        assert_equal_truth(learner, batch, truth)
        assert_equal_truth(copy.deepcopy(learner), batch, truth)
        assert learner.route == "vmap"


def test_a_forward_that_is_not_the_same_in_each_call_is_refused():
    class Alternating(nn.Module):
        steps = 0

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, WAYS)

        def forward(self, x):
            Alternating.steps += 1
            x = self.norm(self.conv(x))
            return self.head((torch.relu(x) if Alternating.steps == 1 else torch.tanh(x)).mean((2, 3)))

    learner = MAML(Alternating().double(), lr=0.1, steps=1)
    with pytest.raises(RuntimeError, match="route: its forward is not the same in each call; route='loop' serves it"):
        learner(images())


def test_an_error_of_the_network_is_its_own():
    class Failing(nn.Linear):
        def forward(self, x):
            if x.shape[0] == 4:
                raise ZeroDivisionError("mine")
            return super().forward(x)

    x, y = torch.randn(TASKS, 4, 4), torch.randint(0, WAYS, (TASKS, 4))
    with pytest.raises(ZeroDivisionError, match="mine"):
        MAML(Failing(4, WAYS), lr=0.1, steps=1)(TaskBatch(Examples(x, y), Examples(x, y)))


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["kept", "saved"])
def test_running_statistics_are_those_of_the_loop(options):
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4, momentum=0.3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(196, 3),
                nn.BatchNorm1d(3),
            )

    model, batch = Net().double(), images()
    found = {}
    for route in ("vmap", "loop"):
        own = copy.deepcopy(model)
        result = MAML(own, lr=0.1, steps=2, route=route, **options)(batch)
        result.loss.backward()
        found[route] = [*own.buffers(), result.loss.detach(), *(p.grad for p in own.parameters())]
    assert found["vmap"][2] == found["loop"][2] == TASKS * 3
    for one, other in zip(found["vmap"], found["loop"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["kept", "checkpoint"])
@pytest.mark.parametrize("route", ["auto", "loop"])
def test_a_checkpoint_in_the_forward_is_refused(route, options):
    # It would compute again when the module holds its own parameters.
    model = Branchy(lambda self, x, h, r: r + checkpoint(torch.tanh, h, use_reentrant=False)).double()
    learner = MAML(model, lr=0.1, steps=2, route=route, **options)
    with pytest.raises(RuntimeError, match=r"calls torch\.utils\.checkpoint, .* pass checkpoint=True to the learner"):
        learner(images())


@pytest.mark.parametrize("served", [True, False], ids=["vmap", "loop"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_first_call_may_be_in_a_checkpoint(served, reentrant):
    """The forward that decides the route is not part of what a checkpoint computes again."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(196, WAYS)]
    model, batch = nn.Sequential(*layers, *([] if served else [_Reading()])).double(), images()
    losses, gradients = [], []
    for within in (False, True):
        learner = MAML(copy.deepcopy(model), lr=0.1, steps=2)
        torch.manual_seed(0)
        # A reentrant checkpoint needs an argument that requires a gradient.
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)

        def computed(scale, learner=learner):
            return scale * learner(batch).loss

        loss = checkpoint(computed, scale, use_reentrant=reentrant) if within else computed(scale)
        loss.backward()
        assert learner.route.startswith("vmap" if served else "loop: ")
        losses.append(loss.detach())
        gradients.append([p.grad for p in (scale, *learner.parameters())])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_tensors_that_a_forward_saves_elsewhere_are_the_tasks_own():
    def forward(self, x, h, r):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return r + torch.tanh(h)

    plain, hooked = (Branchy(function).double() for function in (lambda self, x, h, r: r + torch.tanh(h), forward))
    hooked.load_state_dict(plain.state_dict())
    batch = images()
    results = [MAML(model, lr=0.1, steps=2)(batch).loss for model in (plain, hooked)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "route"), [("vmap", "vmap"), ("features", "vmap"), ("loop", "loop: ")], ids=["vmap", "features", "loop"]
)
def test_a_route_that_is_asked_for_before_leaves_no_trace(kind, route):
    """Random state, running statistics and parameters are those of a learner that was not asked."""
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)]
    if kind == "loop":
        layers.insert(2, _Reading())
    network = CNN(1, hidden=3, ways=2, in_channels=1, image_size=8) if kind == "features" else nn.Sequential(*layers)
    learner = (ANIL if kind == "features" else MAML)(network, lr=0.1, steps=2, allow_nograd=True)
    x = torch.randn(3, 6, *((1, 8, 8) if kind == "features" else (3,)))
    batch = TaskBatch(*[Examples(x, torch.randint(2, (3, 6)))] * 2)
    state, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    planned = planned_route(learner, batch)
    assert planned.startswith(route)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(X, state[name]) for name, X in learner.state_dict().items() if isinstance(X, torch.Tensor))
    learner(batch)
    assert planned in learner.route


class _Reading(nn.Module):
    def forward(self, x):
        return x + 0 * float(x.sum().detach())
