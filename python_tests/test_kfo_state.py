"""KFO's state: on every device, in every format, and never loaded into an update that it was not made for."""

from __future__ import annotations

import copy
import functools
import itertools
import json

import pytest
import torch
from test_kfo import DTYPE, explicit, network, random_grads, randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch


def described(kfo: KFO) -> dict:
    """The extra state of a KFO, read."""
    return json.loads(bytes(kfo.state_dict()["_extra_state"].tolist()))


def extra(state: object) -> torch.Tensor:
    """An extra state of other contents."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def bare(kfo: KFO) -> dict[str, torch.Tensor]:
    return {key: value for key, value in kfo.state_dict().items() if key != "_extra_state"}


def by_assignment(kfo: KFO, state: dict) -> KFO:
    kfo.load_state_dict(state, assign=True)
    return kfo


def by_copy(kfo: KFO, state: dict) -> KFO:
    kfo.to_empty(device="cpu").load_state_dict(state)
    return kfo


def after_a_copy_of_the_module(kfo: KFO, state: dict) -> KFO:
    return by_copy(copy.deepcopy(kfo), state)


@pytest.mark.parametrize("load", [by_assignment, by_copy, after_a_copy_of_the_module])
@pytest.mark.parametrize("setting", [{}, {"psd": False}, {"hidden_layers": 2}], ids=str)
def test_made_on_the_meta_device(load, setting):
    """Its values come with the state; nothing it computes with stays behind on meta."""
    with torch.device("meta"):
        kfo = KFO(network().named_parameters(), **setting)
    source = randomise(KFO(network().named_parameters(), **setting))
    kfo = load(kfo, source.state_dict())
    grads = random_grads(network())
    for update, expected in zip(kfo.transform(grads), explicit(source, grads)):
        torch.testing.assert_close(update, expected)


def test_moved_to_meta_and_back():
    source = randomise(KFO(network().named_parameters()))
    kfo = by_copy(copy.deepcopy(source).to("meta"), source.state_dict())
    grads = random_grads(network())
    for update, expected in zip(kfo.transform(grads), explicit(source, grads)):
        torch.testing.assert_close(update, expected)


def test_made_in_fake_mode():
    shapes = {name: parameter.shape for name, parameter in network().named_parameters()}
    with FakeTensorMode():
        kfo = KFO([(name, torch.ones(shape, dtype=DTYPE)) for name, shape in shapes.items()])
    source = randomise(KFO(network().named_parameters()))
    kfo.load_state_dict(source.state_dict(), assign=True)
    grads = random_grads(network())
    for update, expected in zip(kfo.transform(grads), explicit(source, grads)):
        torch.testing.assert_close(update, expected)


def test_meta_device_inside_a_learner():
    """The meta-gradients of a learner made on meta are those of one made on the CPU."""

    def learner() -> ANIL:
        model = CNN(1, in_channels=1, hidden=4, ways=3, image_size=4, stride=2).to(DTYPE)
        return ANIL(model, update=KFO(model.head.named_parameters()), lr=0.1, steps=2, adapt_update=True)

    source = randomise(learner(), 0.1)
    with torch.device("meta"):
        made = learner()
    made.load_state_dict(source.state_dict(), assign=True)
    x, y = torch.rand(2, 3, 1, 4, 4, dtype=DTYPE), torch.arange(3).expand(2, -1)
    batch = TaskBatch(Examples(x, y), Examples(x.flip(1), y.flip(1)))
    losses = [made(batch).loss, source(batch).loss]
    grads = [torch.autograd.grad(loss, list(of.parameters())) for loss, of in zip(losses, (made, source))]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("psd", [False, True])
def test_holds_nothing_but_its_meta_parameters(psd):
    kfo = KFO(network().named_parameters(), psd=psd)
    assert not list(kfo.buffers())


def test_every_value_of_a_state_dict_is_a_tensor():
    model = network()
    for module in (KFO(model.named_parameters()), MAML(model, update=KFO(model.named_parameters()), lr=0.1, steps=1)):
        assert all(type(value) is torch.Tensor for value in module.state_dict().values())


def test_a_state_says_which_parameters_have_which_factors():
    def made(**options) -> KFO:
        return KFO(network().named_parameters(), **options)

    settings = [{}, {"only": ["head.*"]}, {"only": ["head.weight", "norm.*"]}, {"max_factor": 3}, {"max_factor": 2}]
    for mine, theirs in itertools.permutations(settings, 2):
        with pytest.raises(ValueError, match=r"meta-parameters with factors of parameter '[a-z.]+'='\w*', got"):
            made(**mine).load_state_dict(made(**theirs).state_dict())
    assert described(made(max_factor=3))["factors"] == ["R", "RL", "RL", "RL", "L", "L"]
    # The same factors, said in other words.
    made(only=["head.*"]).load_state_dict(made(only=["head.weight", "head.bias"], max_factor=4).state_dict())


def test_a_state_of_another_scale_is_refused():
    def made(scale: float) -> KFO:
        return randomise(KFO(network().named_parameters(), hidden_layers=1, scale=scale))

    mine, theirs, grads = made(4), made(1.0), random_grads(network())
    assert described(mine)["scale"] == 4.0
    for kfo, other in ((mine, theirs), (theirs, mine)):
        with pytest.raises(ValueError, match=f"meta-parameters with scale={kfo.scale}, got scale={other.scale}"):
            kfo.load_state_dict(other.state_dict())
    expected = explicit(mine, grads)
    again = made(4.0)
    again.load_state_dict(mine.state_dict())
    for kfo in (again, copy.deepcopy(mine)):
        for update, other in zip(kfo.transform(grads), expected):
            torch.testing.assert_close(update, other)


def test_a_state_of_another_update_is_refused():
    class Other(KFO):
        pass

    with pytest.raises(ValueError, match="expected meta-parameters with update='Other', got update='KFO'"):
        Other(network().named_parameters()).load_state_dict(KFO(network().named_parameters()).state_dict())


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    kfo = randomise(KFO(network().named_parameters(), hidden_layers=1))
    safetensors.save_file(kfo.state_dict(), tmp_path / "kfo.safetensors")
    other = KFO(network().named_parameters(), hidden_layers=1)
    other.load_state_dict(safetensors.load_file(tmp_path / "kfo.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(kfo.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="hidden_layers=0, got hidden_layers=1"):
        KFO(network().named_parameters(), bias=kfo.has_bias).load_state_dict(
            safetensors.load_file(tmp_path / "kfo.safetensors")
        )


@pytest.mark.parametrize(
    "walk",
    [
        lambda value: value.clone(),
        lambda value: value.double(),
        lambda value: value.to(torch.bfloat16) if value.dtype == torch.uint8 else value,
        lambda value: (value.float() + value.float()) / 2 if value.dtype == torch.uint8 else value,
    ],
    ids=["clone", "double", "half", "average"],
)
def test_a_state_dict_survives_tools_that_walk_it(walk):
    kfo = randomise(KFO(network().named_parameters()))
    other = KFO(network().named_parameters())
    other.load_state_dict({key: walk(value) for key, value in kfo.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(kfo.parameters(), other.parameters()))


def test_state_dict_under_a_device_context():
    kfo = KFO(network().named_parameters())
    with torch.device("meta"):
        state = kfo.state_dict()
    KFO(network().named_parameters()).load_state_dict(state)


def test_factors_alone_load_where_strict_is_off():
    kfo = randomise(KFO(network().named_parameters()))
    other = KFO(network().named_parameters())
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        other.load_state_dict(bare(kfo))
    missing, unexpected = other.load_state_dict(bare(kfo), strict=False)
    assert (missing, unexpected) == (["_extra_state"], [])
    assert all(torch.equal(a, b) for a, b in zip(kfo.parameters(), other.parameters()))


def test_factors_alone_of_other_sizes_are_refused_before_anything_is_copied():
    kfo = randomise(KFO(network().named_parameters()))
    other = KFO(nn.Linear(3, 4).to(DTYPE).named_parameters())
    start = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match=r"layers\.0\.R: expected shape \(1, 32\), got \(1, \d+\)"):
        other.load_state_dict(bare(kfo), strict=False)
    fits = {"layers.0.L": torch.ones(1, 10, dtype=DTYPE), "layers.0.R": torch.ones(1, 10, dtype=DTYPE)}
    with pytest.raises(ValueError, match=r"layers\.0\.R: expected shape"):
        other.load_state_dict(fits, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(start, other.parameters()))
    part = {"layers.0.L": torch.ones(1, 10, dtype=DTYPE)}
    other.load_state_dict(part, strict=False)
    assert torch.equal(other.layers[0].L, part["layers.0.L"])
    with pytest.raises(ValueError, match="psd=False"):
        KFO(network().parameters(), psd=False).load_state_dict(kfo.state_dict(), strict=False)


def test_a_state_of_another_version_is_named():
    kfo = KFO(network().named_parameters())
    state = kfo.state_dict()
    mine = described(kfo)
    for value, got in [
        (extra({**mine, "version": 7}), "got version 7"),
        (extra({"names": []}), "got version None"),
        (extra([1, 2]), r"got a list"),
        (torch.tensor([7, 8, 9], dtype=torch.uint8), "got a tensor of 3 bytes that are no JSON"),
        (torch.tensor([0.5, -3.0]), "got a tensor of .*no bytes"),
        (torch.zeros(2, 2, dtype=torch.uint8), "got a tensor of .*no bytes"),
        ({"names": ["a"], "shapes": [[1]], "psd": True}, "got a dict with names, shapes, psd"),
        (3, "got a value of type int"),
        (None, "got a value of type NoneType"),
    ]:
        with pytest.raises(ValueError, match=rf"_extra_state: expected .*version 1.*{got}"):
            kfo.load_state_dict({**state, "_extra_state": value})
    for key, value in [("names", 3), ("shapes", [["a"]]), ("names", [])]:
        with pytest.raises(ValueError, match=f"_extra_state: .*{key}"):
            kfo.load_state_dict({**state, "_extra_state": extra({**mine, key: value})})
    short = {key: value for key, value in mine.items() if key != "psd"}
    with pytest.raises(ValueError, match=r"_extra_state: .*lacks psd"):
        kfo.load_state_dict({**state, "_extra_state": extra(short)})


def cubed(x):
    return x**3


class Scaled:
    def by_two(self, x):
        return 2 * x

    @staticmethod
    def by_three(x):
        return 3 * x


def scaled_by(factor):
    def scaled(x):
        return factor * x

    return scaled


def with_activation(activation) -> KFO:
    return randomise(KFO([torch.ones(3, dtype=DTYPE)], hidden_layers=1, activation=activation))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (torch.sin, "torch.sin"),
        (cubed, f"{__name__}.cubed"),
        (Scaled.by_three, f"{__name__}.Scaled.by_three"),
        (nn.functional.silu, "torch.nn.functional.silu"),
        (torch.tanh, "tanh"),
        (nn.functional.gelu, "gelu"),
        (nn.LeakyReLU(0.3), "torch.nn.LeakyReLU(negative_slope=0.3)"),
    ],
)
def test_an_activation_with_a_name_loads_by_it(activation, name):
    kfo = with_activation(activation)
    assert described(kfo)["activation"] == name
    other = with_activation(copy.deepcopy(activation))
    other.load_state_dict(kfo.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(kfo.parameters(), other.parameters()))


UNLIKE = {
    "functions": (torch.sin, torch.cos),
    "lambdas": (lambda x: x, lambda x: 2 * x),
    "closures": (scaled_by(2), scaled_by(3)),
    "partials": (
        functools.partial(nn.functional.leaky_relu, negative_slope=0.1),
        functools.partial(nn.functional.leaky_relu, negative_slope=0.9),
    ),
    "modules": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.9)),
    "methods": (Scaled().by_two, Scaled().by_two),
    "nested modules": (nn.Sequential(nn.LeakyReLU(0.1)), nn.Sequential(nn.LeakyReLU(0.1))),
    "a name and a lambda": ("tanh", lambda x: x),
}


@pytest.mark.parametrize("pair", UNLIKE.values(), ids=UNLIKE)
def test_different_activations_do_not_load_into_each_other(pair):
    a, b = map(with_activation, pair)
    for kfo, other in ((a, b), (b, a)):
        before = [parameter.clone() for parameter in kfo.parameters()]
        with pytest.raises(ValueError, match="expected meta-parameters with activation="):
            kfo.load_state_dict(other.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(before, kfo.parameters()))


@pytest.mark.parametrize("activation", [pair[0] for pair in UNLIKE.values()], ids=UNLIKE)
def test_any_activation_loads_into_its_own_kfo_and_its_copies(activation):
    kfo = with_activation(activation)
    best = copy.deepcopy(kfo.state_dict())
    for other in (kfo, copy.deepcopy(kfo)):
        randomise(other)
        other.load_state_dict(best)
        assert all(torch.equal(best[name], parameter) for name, parameter in other.named_parameters())


def test_without_a_name_the_error_says_what_to_do():
    kfo, other = with_activation(lambda x: x), with_activation(lambda x: x)
    with pytest.raises(ValueError, match=r"without a name.*def.*module.*strict=False"):
        other.load_state_dict(kfo.state_dict())
    other.load_state_dict(bare(kfo), strict=False)


def test_a_changed_activation_is_another():
    kfo = with_activation(lambda x: x)
    state = kfo.state_dict()
    kfo.activation = lambda x: 2 * x
    with pytest.raises(ValueError, match="activation"):
        kfo.load_state_dict(state)
