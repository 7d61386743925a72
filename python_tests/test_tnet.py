"""T-Nets against layers written by hand: values, meta-gradients, what is adapted, absorbing, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from plain_maml import assert_equal_truth, plain_kfo, plain_maml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import CNN, LinNet, TNet, cifar_fs_cnn, mini_imagenet_cnn, omniglot_cnn, softmax_regression
from kfo_ext.tasks import Examples, TaskBatch

WAYS, TASKS = 3, 3


class Mix(nn.Module):
    """A layer, then T over its output channels."""

    def __init__(self, layer: nn.Module, T: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.mix = nn.Linear(*T.shape, bias=False, dtype=T.dtype)
        self.mix.weight.data.copy_(T)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.mix(y) if isinstance(self.layer, nn.Linear) else self.mix(y.movedim(1, -1)).movedim(-1, 1)


def randomised(model: nn.Module) -> nn.Module:
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_layers(model: nn.Module, transformed: nn.Module, prefix: str = "") -> nn.Module:
    """The model with a `Mix` instead of each linear map, of the T's that the transformed copy has there."""
    for name, child in list(model.named_children()):
        there = transformed.get_submodule(prefix + name)
        if hasattr(there, "T"):
            setattr(model, name, Mix(child, there.T))
        else:
            with_layers(child, transformed, f"{prefix}{name}.")
    return model


def pair(model: nn.Module) -> tuple[TNet, nn.Module]:
    """A T-Net with random T, and the same network with layers of T written out."""
    tnet = TNet(randomised(model))
    with torch.no_grad():
        for name, parameter in tnet.named_parameters():
            if name.endswith(".T"):
                parameter.add_(0.4 * torch.randn_like(parameter))
    return tnet, with_layers(copy.deepcopy(model), tnet.model)


def flattened(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, WAYS))


class Nested(nn.Module):
    """Linear maps in a list, one used twice, and a plain list that refers to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh())])
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, WAYS)
        self.order = ["layers.0", "layers.1", "norm", "layers.1", "out"]

    def forward(self, x):
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


# Each with the shape of an example.
NETWORKS = {
    "cnn": (partial(CNN, 2, in_channels=2, hidden=4, ways=WAYS, image_size=8, stride=2), (2, 8, 8)),
    "pooled_cnn": (partial(CNN, 2, in_channels=2, hidden=3, ways=WAYS, image_size=8, pool=2, mean=False), (2, 8, 8)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS)), (4,)),
    "nested": (Nested, (4,)),
    "grouped": (lambda: flattened(nn.Conv2d(4, 6, 3, groups=2), features=6 * 3 * 3), (4, 5, 5)),
}
OTHERS = {
    "one_map": (lambda: nn.Sequential(nn.Linear(4, WAYS, bias=False)), (4,)),
    "conv1d": (lambda: flattened(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), features=15), (2, 5)),
    "depthwise": (lambda: flattened(nn.Conv1d(3, 6, 2, groups=3), features=6 * 4), (3, 5)),
    "conv2d": (lambda: flattened(nn.Conv2d(2, 3, (3, 2), dilation=2, bias=False), features=9), (2, 5, 5)),
    "conv3d": (lambda: flattened(nn.Conv3d(2, 4, 2, stride=2, groups=2), features=4), (2, 2, 3, 3)),
    "transposed1d": (lambda: flattened(nn.ConvTranspose1d(4, 6, 3, groups=2), features=6 * 6), (4, 4)),
    "transposed2d": (lambda: flattened(nn.ConvTranspose2d(2, 3, 2, stride=2), features=3 * 36), (2, 3, 3)),
    "transposed3d": (lambda: flattened(nn.ConvTranspose3d(2, 3, 2, bias=False), features=3 * 27), (2, 2, 2, 2)),
}
every = pytest.mark.parametrize("network", {**NETWORKS, **OTHERS})


def made(network: str) -> tuple[TNet, nn.Module, Tensor]:
    build, shape = {**NETWORKS, **OTHERS}[network]
    return *pair(build()), torch.randn(5, *shape, dtype=torch.float64)


def random_batch(shape: tuple[int, ...]) -> TaskBatch:
    def examples(count: int) -> Examples:
        x = torch.randn(TASKS, count, *shape, dtype=torch.float64)
        return Examples(x, torch.randint(0, WAYS, (TASKS, count)))

    return TaskBatch(examples(6), examples(4))


def inner_names(hand: nn.Module) -> list[str]:
    """What the inner loop adapts of the network written by hand."""
    return [
        f"{owner}.{name}"
        for owner, layer in hand.named_modules()
        if owner.endswith("layer")
        for name, _ in layer.named_parameters()
    ]


@every
def test_value_and_gradients_equal_written_layers(network):
    tnet, hand, x = made(network)
    torch.testing.assert_close(tnet(x), hand(x), rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        for model in (tnet, hand)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradients_equal_written_layers(network, first_order, steps):
    tnet, hand, _ = made(network)
    batch, options = random_batch(NETWORKS[network][1]), {"lr": 0.3, "steps": steps, "first_order": first_order}
    truth = plain_maml(hand, batch, cross_entropy, only=inner_names(hand), **options)
    learner = MAML(tnet, adapted=tnet.adapted, **options)
    assert_equal_truth(learner, batch, truth)
    assert learner.route == "vmap"
    ts = [parameter for name, parameter in tnet.named_parameters() if name.endswith(".T")]
    assert all(gradient.any() for gradient in torch.autograd.grad(learner(batch).loss, ts))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_body_alone(first_order, steps):
    tnet, hand, _ = made("cnn")
    batch, options = random_batch(NETWORKS["cnn"][1]), {"lr": 0.3, "steps": steps, "first_order": first_order}
    only = [name for name in inner_names(hand) if not name.startswith("head.")]
    truth = plain_maml(hand, batch, cross_entropy, only=only, **options)
    body = [name for name in tnet.adapted if not name.startswith("model.head.")]
    assert_equal_truth(MAML(tnet, adapted=body, **options), batch, truth)


@pytest.mark.parametrize("network", ["cnn", "mlp"])
def test_with_a_learned_update(network):
    tnet, hand, _ = made(network)
    parameters = dict(tnet.named_parameters())
    kfo = KFO([(name, parameters[name]) for name in tnet.adapted])
    with torch.no_grad():
        for row in kfo.phi:
            row.add_(0.3 * torch.randn_like(row))
    batch, options = random_batch(NETWORKS[network][1]), {"lr": 0.2, "steps": 3, "adapt_update": True}
    only = inner_names(hand)
    truth = plain_maml(hand, batch, cross_entropy, only=only, rule=plain_kfo(), phi=list(kfo.phi), **options)
    assert_equal_truth(MAML(tnet, adapted=tnet.adapted, update=kfo, **options), batch, truth)


def test_inside_another_module_t_is_not_adapted_either():
    """What lies around a T-Net is adapted as a whole, T-Nets in it as they say; in each name of a shared one."""
    tnet = TNet(nn.Linear(4, 4))
    model = randomised(nn.Sequential(nn.Linear(4, 4), tnet, nn.Tanh(), tnet, nn.Linear(4, WAYS)))
    learner = MAML(model, lr=0.3, steps=3)
    assert learner.adapted == ("0.weight", "0.bias", "1.model.W", "1.model.b", "4.weight", "4.bias")
    batch = random_batch((4,))
    truth = plain_maml(model, batch, cross_entropy, only=learner.adapted, lr=0.3, steps=3)
    assert_equal_truth(learner, batch, truth)


@pytest.mark.parametrize("make", [omniglot_cnn, cifar_fs_cnn, mini_imagenet_cnn])
def test_starts_as_the_network_and_leaves_it_alone(make):
    model = make(2, hidden=4)
    own, x = copy.deepcopy(model.state_dict()), torch.rand(3, model.blocks[0].conv.in_channels, 84, 84)
    x = x[..., :28, :28] if make is omniglot_cnn else x[..., :32, :32] if make is cifar_fs_cnn else x
    tnet = TNet(model)
    assert torch.equal(tnet(x), model(x))
    with torch.no_grad():
        for parameter in tnet.parameters():
            parameter.zero_()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_only_weights_and_biases_are_adapted():
    tnet = TNet(CNN(1, in_channels=1, hidden=2, ways=2, image_size=4))
    names = [f"model.{layer}.{name}" for layer in ("blocks.0.conv", "head") for name in ("W", "b")]
    assert tnet.adapted == tuple(names)
    rest = {name for name, _ in tnet.named_parameters()} - set(names)
    norm = {"model.blocks.0.norm.weight", "model.blocks.0.norm.bias"}
    assert rest == {"model.blocks.0.conv.T", "model.head.T"} | norm


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WAYS, 4)
        self.map = nn.Linear(4, 4)
        self.head = nn.Linear(4, WAYS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.map(self.embedding(x).mean(1))))


def test_an_embedding_has_no_t_and_a_tie_stays():
    model = randomised(Tied())
    tnet = TNet(model)
    with torch.no_grad():
        tnet.model.head.T.add_(torch.randn(WAYS, WAYS))
    assert tnet.model.embedding.weight is tnet.model.head.W
    assert tnet.adapted == tuple(f"model.{name}" for name in ("embedding.weight", "map.W", "map.b", "head.W"))
    x = torch.randint(0, WAYS, (5, 2))
    torch.testing.assert_close(tnet(x), model(x) @ tnet.model.head.T.T, rtol=1e-12, atol=1e-12)
    y = torch.randint(0, WAYS, (TASKS, 5))
    examples = Examples(x.expand(TASKS, -1, -1), y)
    learner = MAML(tnet, adapted=tnet.adapted, lr=0.1, steps=2)
    assert learner(TaskBatch(examples, examples)).loss.isfinite()
    torch.testing.assert_close(tnet.absorb()(x), tnet(x), rtol=1e-12, atol=1e-12)


def test_every_reference_to_a_layer_sees_its_t():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model.aliases = [model[0]]
    twice = nn.Sequential(model, model[0])
    tnet = TNet(twice)
    assert tnet.model[0][0] is tnet.model[1] is tnet.model[0].aliases[0]
    assert sum(name.endswith("T") for name, _ in tnet.named_parameters()) == 1


def test_the_output_of_attention_has_a_t():
    """A module that reads the weight of a layer gets T W."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    tnet, x = TNet(attention), torch.randn(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        tnet.model.out_proj.T.add_(torch.randn(4, 4))
        nn.init.normal_(tnet.model.out_proj.b)
        attention.out_proj.bias.copy_(tnet.model.out_proj.b)
    T = tnet.model.out_proj.T
    torch.testing.assert_close(tnet(x, x, x)[0], attention(x, x, x)[0] @ T.T, rtol=1e-12, atol=1e-12)


@every
def test_absorbed(network):
    tnet, _, x = made(network)
    before = copy.deepcopy(tnet)
    absorbed = tnet.absorb()
    assert torch.equal(tnet(x), before(x))
    assert tnet.adapted == before.adapted
    torch.testing.assert_close(absorbed(x), tnet(x), rtol=1e-12, atol=1e-12)
    model = {**NETWORKS, **OTHERS}[network][0]()
    assert [type(module) for module in absorbed.modules()] == [type(module) for module in model.modules()]
    assert absorbed.state_dict().keys() == model.state_dict().keys()
    if not any(getattr(module, "groups", 1) > 1 for module in model.modules()):
        model.double().load_state_dict(absorbed.state_dict())
        assert torch.equal(model(x), absorbed(x))


def test_absorbing_an_adapted_task():
    tnet, _, x = made("cnn")
    adapted = MAML(tnet, adapted=tnet.adapted, lr=0.3, steps=2).adapt((x, torch.randint(0, WAYS, (5,))))
    with torch.no_grad():
        torch.testing.assert_close(adapted.module().absorb()(x), adapted.predict(x), rtol=1e-11, atol=1e-11)


def test_absorbed_keeps_modes_and_frozen_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Linear(3, 2)).eval()
    model[0].weight.requires_grad_(False)
    absorbed = TNet(model).absorb()
    assert [parameter.requires_grad for parameter in absorbed.parameters()] == [False, True, True, True]
    assert not any(module.training for module in absorbed.modules())


@every
def test_copies_and_states(network):
    tnet, _, x = made(network)
    state = io.BytesIO()
    torch.save(tnet.state_dict(), state)
    state.seek(0)
    fresh = TNet({**NETWORKS, **OTHERS}[network][0]().double())
    fresh.load_state_dict(torch.load(state, weights_only=True))
    y = tnet(x)
    for other in (fresh, copy.deepcopy(tnet), pickle.loads(pickle.dumps(tnet))):
        assert torch.equal(other(x), y)
        assert other.adapted == tnet.adapted
    single = copy.deepcopy(tnet).float()
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}
    torch.testing.assert_close(single(x.float()), y.float(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        next(single.parameters()).zero_()
    assert torch.equal(tnet(x), y)


@pytest.mark.parametrize("option", [{"checkpoint": True}, {"route": "loop"}, {"bf16": True}], ids=str)
def test_options_of_the_learner(option):
    tnet, _, _ = made("cnn")
    batch = random_batch(NETWORKS["cnn"][1])
    if "bf16" in option:
        tnet, batch = tnet.float(), batch.to(dtype=torch.float32)
    plain, other = (MAML(tnet, adapted=tnet.adapted, lr=0.2, steps=2, **o)(batch).loss for o in ({}, option))
    tolerance = 0.05 if "bf16" in option else 1e-10
    torch.testing.assert_close(plain, other, rtol=tolerance, atol=tolerance)


def test_of_a_linnet():
    tnet, hand = pair(LinNet(softmax_regression(4, WAYS), [5, 4]))
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(tnet(x), hand(x), rtol=1e-12, atol=1e-12)
    collapsed = tnet.absorb().collapse()
    torch.testing.assert_close(collapsed(x), tnet(x), rtol=1e-12, atol=1e-12)
    assert collapsed.state_dict().keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("wrap", [lambda tnet: tnet, nn.Sequential], ids=["itself", "inside"])
def test_anil_refuses(wrap):
    with pytest.raises(ValueError, match=r"ANIL adapts the head alone, but TNet has a T after every layer.*adapted="):
        ANIL(wrap(TNet(omniglot_cnn())), lr=0.1, steps=1)


def test_torchs_own_start_would_change_nothing():
    tnet = TNet(omniglot_cnn())
    with pytest.raises(RuntimeError, match="TLinear: initialise the network before TNet"):
        tnet.model.head.reset_parameters()
    with pytest.raises(KeyError, match="already exists"):
        tnet.model.head.weight = nn.Parameter(torch.zeros(5, 32))


class Own(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class Extended(nn.Linear):
    """A class of its own with the forward of nn.Linear."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.scale = 2.0


def test_a_subclass_with_the_same_forward():
    tnet = TNet(nn.Sequential(Extended(3)))
    again = pickle.loads(pickle.dumps(copy.deepcopy(tnet)))
    assert isinstance(again.model[0], Extended)
    assert again.model[0].scale == 2
    assert type(again.absorb()[0]) is Extended


def replaced() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = torch.tanh
    return layer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "computes its weight or bias from other tensors"),
        (lambda: parametrizations.orthogonal(nn.Linear(2, 2)), "remove the parametrisation"),
        (lambda: prune.l1_unstructured(nn.Linear(2, 2), "bias", 1), "Linear '0' computes its weight or bias"),
        (lambda: nn.LazyLinear(2), "is lazy: give it a first input"),
        (lambda: Own(2, 2), "Own '0' has a forward of its own.*torch.nn.Linear"),
        (lambda: OwnConvolution(2, 2, 1), "OwnConvolution '0' has a forward of its own.*torch.nn.Conv2d"),
        (replaced, "Linear '0' has a forward of its own"),
        (lambda: TNet(nn.Linear(2, 2)), "TLinear '0.model' has a T already"),
        (nn.Tanh, "at least one linear map of torch.nn .Linear, Conv1d.*got Sequential without any"),
        (lambda: nn.Embedding(2, 2), "got Sequential without any"),
    ],
)
def test_refused_networks(model, message):
    with pytest.raises(ValueError, match=message):
        TNet(nn.Sequential(model()))


@pytest.mark.parametrize(
    "model", [None, "cnn", omniglot_cnn, torch.zeros(2)], ids=["None", "str", "function", "tensor"]
)
def test_no_networks(model):
    with pytest.raises(TypeError, match="model: expected a module of Python"):
        TNet(model)
