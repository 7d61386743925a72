"""Networks that are hard to call with other parameters: shared modules, changing buffers, attention, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from plain_maml import assert_equal_truth, plain_kfo, plain_maml
from torch import nn
from torch.nn.functional import cross_entropy

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3
OPTIONS = {"lr": 0.3, "steps": 2}


def vectors(width: int = 4, count: int = 5, tasks: int = TASKS) -> TaskBatch:
    def examples() -> Examples:
        x = torch.randn(tasks, count, width, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (tasks, count)))

    return TaskBatch(examples(), examples())


def words(count: int = 5, length: int = 4, vocabulary: int = 7) -> TaskBatch:
    def examples() -> Examples:
        return Examples(torch.randint(0, vocabulary, (TASKS, count, length)), torch.randint(0, WAYS, (TASKS, count)))

    return TaskBatch(examples(), examples())


class Twice(nn.Module):
    """A net inside a net, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.alias = self.inner
        self.head = nn.Linear(4, WAYS)

    def forward(self, x):
        return self.head(self.alias(self.inner(x)))


class Tied(nn.Module):
    """One parameter in two modules, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, WAYS)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def shared_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, WAYS))


def shared_norm() -> nn.Module:
    norm = nn.LayerNorm(4)
    return nn.Sequential(norm, nn.Linear(4, 4), nn.Tanh(), norm, nn.Linear(4, WAYS))


def shared_and_tied() -> nn.Module:
    model = Tied()
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleList([model, model])[0], nn.Linear(WAYS, WAYS))


SHARED = {"layer": shared_layer, "norm": shared_norm, "net": Twice, "tied": Tied, "both": shared_and_tied}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("update", [False, True], ids=["descent", "kfo"])
def test_a_module_under_two_names(kind, update):
    model, batch = SHARED[kind]().double(), vectors()
    before = copy.deepcopy(model.state_dict())
    kfo = KFO(model.named_parameters(), bias=True) if update else None
    phi = kfo.phi if update else ()
    for row in phi:
        nn.init.normal_(row, std=0.5)
    learner = MAML(model, update=kfo, **OPTIONS)
    with torch.no_grad():
        evaluated = [learner(batch).loss for _ in range(3)]
    rule = plain_kfo(bias=True) if update else None
    truth = plain_maml(model, batch, cross_entropy, rule=rule, phi=phi, **OPTIONS)
    assert_equal_truth(learner, batch, truth)
    assert evaluated == [evaluated[0]] * 3
    torch.testing.assert_close(evaluated[0], truth.loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Remembering(nn.Module):
    """A forward that reads a buffer and changes it: in place, or by assigning another tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.head, self.in_place = nn.Linear(4, 4), nn.Linear(4, WAYS), in_place
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        hidden = self.first(x) / self.scale.clone()
        now = 0.5 * self.scale + 0.5 * hidden.detach().abs().mean(0)
        if self.in_place:
            self.scale.copy_(now)
        else:
            self.scale = now
        return self.head(torch.tanh(hidden))


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, WAYS))


def running() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, WAYS))


CHANGING = {
    "in place": lambda: Remembering(True),
    "replaced": lambda: Remembering(False),
    "spectral norm": spectral,
    "running statistics": running,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_checkpointing_with_buffers_that_change_is_bit_equal(kind):
    model, batch = CHANGING[kind]().double(), vectors()
    results = []
    for checkpoint in (False, True):
        learner = MAML(copy.deepcopy(model), checkpoint=checkpoint, lr=0.3, steps=3)
        result = learner(batch)
        result.loss.backward()
        results.append([result.loss, *(p.grad for p in learner.parameters()), *learner.buffers()])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_checkpointing_refuses_other_state_that_changes():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    learner = MAML(Counting(4, WAYS).double(), checkpoint=True, **OPTIONS)
    result = learner(vectors())
    with pytest.raises(RuntimeError, match="checkpoint: the model computed other losses"):
        result.loss.backward()


class Attentive(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, WAYS)

    def forward(self, x):
        return self.head(self.layer(x.unflatten(1, (2, 4))).mean(1))


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).unsqueeze(1).chunk(3, -1)).squeeze(1)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


ATTENTION = {
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "function": OwnAttention,
    "multihead": lambda: SelfAttention(4, 2, batch_first=True),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_has_second_derivatives(kind):
    model, batch = Attentive(ATTENTION[kind]()).double(), vectors(width=8)
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        truth = plain_maml(model, batch, cross_entropy, **OPTIONS)
    for checkpoint in (False, True):
        assert_equal_truth(MAML(model, checkpoint=checkpoint, **OPTIONS), batch, truth)
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


class Bag(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, WAYS)
        nn.init.normal_(self.words.weight, std=2)

    def forward(self, x):
        return self.head(self.words(x).mean(1))


class SparseBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(7, 4, sparse=True), nn.Linear(4, WAYS)

    def forward(self, x):
        return self.head(self.words(x))


@pytest.mark.parametrize(
    ("make", "first_order"),
    # torch has no second derivative of an embedding bag.
    [(lambda: Bag(sparse=True), False), (lambda: Bag(sparse=True), True), (SparseBag, True)],
    ids=["second", "first", "bag"],
)
def test_sparse_gradients(make, first_order):
    model, batch = make().double(), words()
    truth = plain_maml(model, batch, cross_entropy, first_order=first_order, **OPTIONS)
    truth = truth._replace(gradients=[g.to_dense() if g.is_sparse else g for g in truth.gradients])
    assert_equal_truth(MAML(model, first_order=first_order, **OPTIONS), batch, truth)


class BoundedBag(nn.Module):
    """Bounded and tied: the scaled weight is used a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(7, 4, max_norm=1.5, mode="mean"), nn.Linear(4, 7, bias=False)
        nn.init.normal_(self.words.weight, std=2)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(torch.tanh(self.words(x)))


BOUNDED = {"bag": lambda: Bag(max_norm=1.0), "l1": lambda: Bag(max_norm=1.0, norm_type=1.0), "tied": BoundedBag}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bag", {}),
        ("bag", {"checkpoint": True}),
        ("l1", {}),
        # torch has no second derivative of an embedding bag.
        ("tied", {"first_order": True}),
    ],
    ids=str,
)
def test_embeddings_of_bounded_norm(kind, options):
    model, batch = BOUNDED[kind]().double(), words()
    plain = copy.deepcopy(model)
    truth = plain_maml(plain, batch, cross_entropy, lr=0.3, steps=3, first_order="first_order" in options)
    assert_equal_truth(MAML(model, lr=0.3, steps=3, **options), batch, truth)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


@pytest.mark.parametrize("learner", [MAML, ANIL])
def test_eight_threads_may_call_one_learner(learner):
    class Net(nn.Sequential):
        @property
        def head(self):
            return self[-1]

        def features(self, x):
            return self[:-1](x)

    model = Net(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, WAYS)).double()
    maml = learner(model, route="loop", **OPTIONS)
    batches = [vectors(count=20) for _ in range(8)]
    expected = [maml(batch) for batch in batches]
    gradients = [torch.autograd.grad(result.loss, list(maml.parameters()), allow_unused=True) for result in expected]

    def work(i: int):
        result = maml(batches[i])
        return result, torch.autograd.grad(result.loss, list(maml.parameters()), allow_unused=True)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, [*range(8)] * 6))
    for i, (result, grads) in zip([*range(8)] * 6, results):
        assert torch.equal(result.query_losses, expected[i].query_losses)
        assert all(a is b or torch.equal(a, b) for a, b in zip(grads, gradients[i]))


# torch's own, as its compiler is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_learner_gives_the_same_numbers():
    model, batch = shared_layer().double(), vectors()
    learner = MAML(model, **OPTIONS)
    truth = plain_maml(model, batch, cross_entropy, **OPTIONS)
    compiled = torch.compile(learner)
    result = compiled(batch)
    torch.testing.assert_close(result.loss.detach(), truth.loss)
    result.loss.backward()
    for parameter, expected in zip(model.parameters(), truth.gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
