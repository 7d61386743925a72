"""LinNet against layers written by hand: meta-gradients of MAML, ANIL and BOIL, collapsing, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plain_maml import assert_equal_truth, plain_maml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from kfo_ext import ANIL, MAML
from kfo_ext.networks import (
    CNN,
    LinNet,
    deep_regression,
    logistic_regression,
    omniglot_cnn,
    shallow_regression,
    softmax_regression,
)
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3


def cnn() -> CNN:
    return CNN(2, in_channels=2, hidden=4, ways=WAYS, image_size=8, stride=2)


class Named(nn.Module):
    """A head by another name, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"body": nn.Linear(4, 5), "fc": nn.Linear(5, WAYS)})

    def features(self, x):
        return torch.tanh(self.net["body"](x))

    def forward(self, x):
        return self.net["fc"](self.features(x))


# The model, the widths, the name of the head where it is to be given, and the shape of an example.
NETWORKS = {
    "cnn": (cnn, [4, 4], None, (2, 8, 8)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS)), [5], None, (4,)),
    "nested": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, WAYS))), [2], None, (4,)),
    "named": (Named, [3, 2, 7], "net.fc", (4,)),
    "softmax": (lambda: softmax_regression(8, WAYS), [6, 5, 4, 4], None, (2, 4)),
    "itself": (lambda: nn.Linear(4, WAYS, bias=False), [3], "", (4,)),
}
every = pytest.mark.parametrize("network", NETWORKS)


class ByHand(nn.Module):
    """The model's features, then the layers of the stack one after the other."""

    def __init__(self, features, parts: list[nn.Module], layers: list[nn.Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(copy.deepcopy(parts))
        self.head = nn.Sequential()
        self.features = lambda x: features(self.parts, x)
        for layer in layers:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
            plain.load_state_dict(layer.state_dict())
            self.head.append(plain)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def hand_of(network: str, linnet: LinNet) -> ByHand:
    model = linnet.model
    features, parts = {
        "cnn": lambda: (lambda parts, x: parts[0](x).mean((2, 3)), [model.blocks]),
        "mlp": lambda: (lambda parts, x: torch.tanh(parts[0](x)), [model[0]]),
        "nested": lambda: (lambda parts, x: parts[0](x).relu(), [model[0]]),
        "named": lambda: (lambda parts, x: torch.tanh(parts[0](x)), [model.net["body"]]),
        "softmax": lambda: (lambda parts, x: x.flatten(1), []),
        "itself": lambda: (lambda parts, x: x, []),
    }[network]()
    return ByHand(features, parts, list(linnet.head))


def made(network: str) -> tuple[LinNet, TaskBatch]:
    build, widths, head, shape = NETWORKS[network]
    linnet = LinNet(build().double(), widths, head)
    with torch.no_grad():
        for parameter in linnet.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def examples(count: int) -> Examples:
        x = torch.randn(TASKS, count, *shape, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count)))

    return linnet, TaskBatch(examples(6), examples(4))


@every
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_maml(network, first_order, steps):
    linnet, batch = made(network)
    options = {"lr": 0.3, "steps": steps, "first_order": first_order}
    truth = plain_maml(hand_of(network, linnet), batch, cross_entropy, **options)
    learner = MAML(linnet, **options)
    assert_equal_truth(learner, batch, truth)
    assert learner.route == "vmap"


@pytest.mark.parametrize("network", ["cnn", "named", "softmax"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_anil(network, first_order, steps):
    linnet, batch = made(network)
    options = {"lr": 0.3, "steps": steps, "first_order": first_order}
    truth = plain_maml(hand_of(network, linnet), batch, cross_entropy, head=True, **options)
    learner = ANIL(linnet, **options)
    assert_equal_truth(learner, batch, truth)
    assert learner.route == "vmap"


@pytest.mark.parametrize("network", ["cnn", "mlp", "named"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_body_alone(network, steps):
    linnet, batch = made(network)
    hand = hand_of(network, linnet)
    heads = {id(parameter) for parameter in linnet.head.parameters()}
    body = [name for name, parameter in linnet.named_parameters() if id(parameter) not in heads]
    only = [name for name, _ in hand.named_parameters() if not name.startswith("head.")]
    truth = plain_maml(hand, batch, cross_entropy, only=only, lr=0.3, steps=steps)
    assert_equal_truth(MAML(linnet, adapted=body, lr=0.3, steps=steps), batch, truth)


@every
def test_collapsed(network):
    linnet, batch = made(network)
    build, _, _, shape = NETWORKS[network]
    collapsed, x = linnet.collapse(), torch.randn(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(collapsed(x), linnet(x), rtol=1e-12, atol=1e-12)
    model = build().double()
    assert [type(module) for module in collapsed.modules()] == [type(module) for module in model.modules()]
    model.load_state_dict(collapsed.state_dict())
    assert torch.equal(model(x), collapsed(x))
    # The LinNet is as it was, and adapts on.
    assert len(linnet.head) == len(NETWORKS[network][1]) + 1
    assert MAML(linnet, lr=0.1, steps=1)(batch).loss.isfinite()


def test_collapsed_in_float32_has_no_error_of_its_own():
    linnet = LinNet(softmax_regression(100, 7), [256, 128, 64, 64])
    x = torch.randn(50, 100)
    exact = copy.deepcopy(linnet).double()(x.double())
    error, own = ((model(x).double() - exact).abs().max() for model in (linnet.collapse(), linnet))
    assert error < 2 * own


def test_collapsing_an_adapted_task():
    linnet, batch = made("cnn")
    adapted = MAML(linnet, lr=0.3, steps=2).adapt((batch.support.x[0], batch.support.y[0]))
    x = batch.query.x[0]
    with torch.no_grad():
        torch.testing.assert_close(adapted.module().collapse()(x), adapted.predict(x), rtol=1e-11, atol=1e-11)


@every
def test_copies_and_states(network):
    linnet, batch = made(network)
    build, widths, head, _ = NETWORKS[network]
    x = batch.query.x[0]
    fresh = LinNet(build().double(), widths, head)
    fresh.load_state_dict(linnet.state_dict())
    for other in (fresh, copy.deepcopy(linnet), pickle.loads(pickle.dumps(linnet))):
        assert torch.equal(other(x), linnet(x))
    assert {parameter.dtype for parameter in copy.deepcopy(linnet).float().parameters()} == {torch.float32}


def test_layers_and_their_start():
    model = omniglot_cnn(2, ways=WAYS).double().eval()
    before = copy.deepcopy(model.state_dict())
    linnet = LinNet(model, (6, 7))
    sizes = [(layer.in_features, layer.out_features) for layer in linnet.head]
    assert sizes == [(32, 6), (6, 7), (7, WAYS)]
    for layer, (p, q) in zip(linnet.head, sizes):
        bound = (6 / (p + q)) ** 0.5
        assert bound > layer.weight.abs().max() > 0.7 * bound
        assert layer.weight.dtype == torch.float64
        assert not layer.bias.any()
        assert not layer.training
    with torch.no_grad():
        for parameter in linnet.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.head, nn.Linear)


def test_every_reference_to_the_head_is_the_stack():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model.aliases = [model[1]]
    linnet = LinNet(model, [4])
    assert linnet.model.aliases[0] is linnet.head is linnet.model[1]
    assert linnet.collapse().aliases[0].weight.shape == (2, 3)


def test_one_dimension():
    """SHALLOW is c x and DEEP a b x, whose gradients by the paper are those of their product."""
    shallow, deep = shallow_regression().double(), deep_regression().double()
    x, y = torch.randn(7, 1, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    (c,), (b, a) = shallow.parameters(), deep.parameters()
    assert (b is deep.head[0].weight, a is deep.head[1].weight) == (True, True)
    torch.testing.assert_close(shallow(x), c * x)
    torch.testing.assert_close(deep(x), a * b * x)
    error = 2 * (x * (a * b * x - y)).mean()
    da, db = torch.autograd.grad(mse_loss(deep(x), y), (a, b))
    torch.testing.assert_close((da, db), (b * error, a * error))
    assert sum(parameter.numel() for parameter in deep_regression(3).parameters()) == 3
    collapsed = deep.collapse()
    torch.testing.assert_close(collapsed.head.weight, a * b)


def test_logistic_regression_and_its_linnet():
    model, x = logistic_regression(3), torch.randn(5, 3)
    torch.testing.assert_close(model(x), x @ model.head.weight.T)
    linnet = LinNet(model, [3])
    B, a = (layer.weight for layer in linnet.head)
    torch.testing.assert_close(linnet(x), x @ B.T @ a.T)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    model[1].weight = model[0].weight
    return model


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = torch.tanh
    return model


class Own(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (None, ([2],), TypeError, "model: expected a module of Python, got NoneType"),
        (cnn(), (4,), TypeError, "widths: expected a sequence of integers"),
        (cnn(), ("44",), TypeError, "widths: expected a sequence of integers"),
        (cnn(), ([],), ValueError, "widths: expected at least one"),
        (cnn(), ([4, 0],), ValueError, "widths: expected at least one, each an integer of at least 1, got .4, 0."),
        (cnn(), ([4.0],), ValueError, "widths"),
        (cnn(), ([4], 3), TypeError, "head: expected the name of a submodule, got 3"),
        (cnn(), ([4], "tail"), ValueError, "head: .* got 'tail'; CNN has none such"),
        (cnn(), ([4], "blocks"), TypeError, "head: expected a torch.nn.Linear, got 'blocks', which is Sequential"),
        (Named(), ([4],), ValueError, "head: Named neither has a submodule named head nor is a Sequential"),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), ([4],), ValueError, "head: Sequential neither"),
        (nn.Sequential(Own(2, 2)), ([4],), TypeError, "got '0', which is Own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), ([4],), TypeError, "which is ParametrizedLinear"),
        (hooked(), ([4],), ValueError, "head: '0' has hooks"),
        (replaced(), ([4],), ValueError, "head: the forward of '0' was replaced"),
        (tied(), ([4],), ValueError, "head: '1' shares a parameter with '0'"),
    ],
)
def test_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        LinNet(model, *arguments)


def test_a_stack_of_something_else_does_not_collapse():
    linnet = LinNet(cnn(), [4])
    linnet.head.append(nn.Tanh())
    with pytest.raises(ValueError, match="collapse: expected only linear layers"):
        linnet.collapse()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_one_layer_would_lose_does_not_collapse():
    linnet = LinNet(nn.Sequential(nn.Linear(4, 3)), [5])
    for module, where in ((linnet.head, "the head"), (linnet.head[1], "layer '1' of the head")):
        hook = module.register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(ValueError, match=f"collapse: {where} has hooks, which one layer would lose"):
            linnet.collapse()
        hook.remove()
    linnet.head[0] = Doubled(4, 5)
    with pytest.raises(ValueError, match="collapse: layer '0' of the head has a forward of its own"):
        linnet.collapse()


@pytest.mark.parametrize("biases", [(False, True), (True, False), (False, False)])
def test_collapsed_with_the_biases_that_there_are(biases):
    linnet = LinNet(nn.Sequential(nn.Linear(4, 3)).double(), [5]).requires_grad_(False)
    linnet.head[0], linnet.head[1] = (nn.Linear(p, q, b).double() for p, q, b in zip((4, 5), (5, 3), biases))
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(linnet.collapse()(x), linnet(x), rtol=1e-12, atol=1e-12)
    assert all(X.requires_grad for X in linnet.collapse().parameters())
    assert not any(X.requires_grad for X in linnet.requires_grad_(False).collapse().parameters())


def test_anil_needs_features():
    with pytest.raises(TypeError, match="model: expected a module with a method features"):
        ANIL(made("mlp")[0], lr=0.1, steps=1)
