"""KFO: starts as gradient descent, matches explicit formulas, drops into learn2learn-style loops, saves and refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kfo_ext import KFO
from kfo_ext.trainer.config import Config
from kfo_ext.trainer.recipe import build_learner
from kfo_ext.updates.activations import ACTIVATIONS

DTYPE = torch.float64
SETTINGS = [
    {"psd": psd, "bias": bias, "hidden_layers": hidden, "activation": activation}
    for psd in (False, True)
    for bias in (False, True)
    for hidden, activation in ((0, "tanh"), (1, "tanh"), (2, "relu"))
]
SETTINGS += [{"hidden_layers": 1, "scale": 30.0}, {"psd": False, "bias": False, "hidden_layers": 2, "scale": 0.1}]


def network() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, (2, 3))
            self.norm = nn.BatchNorm2d(3, track_running_stats=False)
            self.head = nn.Linear(3, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))

    return Net().to(DTYPE)


def randomise(module: nn.Module, scale: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def network_loss(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, 4, 5, generator=generator, dtype=DTYPE)
    return nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3, 0]))


def random_grads(model: nn.Module, tasks: int | None = None) -> list[torch.Tensor]:
    lead = () if tasks is None else (tasks,)
    return [torch.randn(lead + parameter.shape, dtype=DTYPE) for parameter in model.parameters()]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_starts_as_gradient_descent(setting):
    model = network()
    grads = random_grads(model)
    for update, grad in zip(KFO(model.parameters(), **setting).transform(grads), grads):
        torch.testing.assert_close(update, grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_learns_from_its_start(setting):
    """No dead saddle: after one step on a random loss, every kind of factor has a gradient."""
    model = network()
    kfo = KFO(model.parameters(), **setting)
    target = random_grads(model)
    optimizer = torch.optim.Adam(kfo.parameters(), lr=0.01)
    grads = random_grads(model)

    def loss() -> torch.Tensor:
        return sum(((u - t) ** 2).sum() for u, t in zip(kfo.transform(grads), target))

    start = loss()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < start
    optimizer.zero_grad()
    loss().backward()
    for name, parameter in kfo.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def explicit(kfo: KFO, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """U(g) per parameter, with torch.kron for every B matrix: row-major vec(R^T g L) = kron(R^T, L^T) vec(g)."""
    activation = kfo.activation if callable(kfo.activation) else ACTIVATIONS[kfo.activation]
    updates = []
    for i, (grad, (B, p, q)) in enumerate(zip(grads, kfo.problems.shapes)):
        hidden = kfo.scale * grad.reshape(B, p * q)
        for depth, layer in enumerate(kfo.layers):
            R, L = kfo.factors(depth)[i]
            if layer.psd:
                R, L = R.T @ R, L.T @ L
            hidden = (activation(hidden) if depth else hidden) @ torch.kron(R.T.contiguous(), L.T.contiguous()).T
            if layer.bias is not None:
                offset = sum(b * c for _, b, c in kfo.problems.shapes[:i])
                hidden = hidden + layer.bias[0, offset : offset + p * q]
        updates.append(hidden.reshape(grad.shape) if len(kfo.layers) == 1 else grad + hidden.view_as(grad) / kfo.scale)
    return updates


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_explicit_kronecker_products(setting):
    model = network()
    kfo = randomise(KFO(model.named_parameters(), **setting))
    grads = random_grads(model)
    for update, expected in zip(kfo.transform(grads), explicit(kfo, grads)):
        torch.testing.assert_close(update, expected)


@pytest.mark.parametrize("setting", SETTINGS[::3], ids=str)
def test_tasks_are_independent(setting):
    model = network()
    kfo = randomise(KFO(model.parameters(), **setting))
    grads = random_grads(model, tasks=3)
    updates = kfo.transform(grads)
    for task in range(3):
        for update, alone in zip(updates, kfo.transform([grad[task] for grad in grads])):
            torch.testing.assert_close(update[task], alone)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hidden_layers": 1}, True),
        ({"hidden_layers": 2, "psd": False}, True),
        ({"hidden_layers": 2, "bias": False}, False),
        ({"hidden_layers": 1, "bias": True}, True),
        ({"bias": None, "hidden_layers": 1}, True),
        ({}, False),
        ({"bias": True}, True),
    ],
    ids=str,
)
def test_bias_of_each_layer_is_on_with_hidden_layers(options, expected):
    kfo = randomise(KFO(network().named_parameters(), **options))
    assert kfo.has_bias is expected
    biases = [name for name, _ in kfo.named_parameters() if name.endswith(".bias")]
    assert len(biases) == (len(kfo.layers) if expected else 0)
    grads = [torch.zeros_like(grad) for grad in random_grads(network())]
    assert any(update.any() for update in kfo.transform(grads)) is expected


def test_a_trainer_and_its_command_have_the_bias_of_the_update():
    for options, expected in (({"hidden_layers": 1}, True), ({}, False), ({"hidden_layers": 1, "bias": False}, False)):
        config = Config(hidden=4, layers=1, **options)
        assert build_learner(Config.from_dict(config.to_dict())).update.has_bias is expected
    with pytest.raises(TypeError, match="bias: expected bool, got 1"):
        Config(bias=1)


def test_a_phi_of_another_kfo_is_refused():
    kfo = KFO(network().named_parameters(), hidden_layers=1)
    G = torch.zeros(1, kfo.problems.packing.numel, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"phi: expected 6 tensors.*got 4"):
        kfo.rule(KFO(network().named_parameters(), hidden_layers=1, bias=False).phi, G)
    part = KFO(network().named_parameters(), only=["head.*"])
    with pytest.raises(ValueError, match=rf"G: expected shape \(tasks, {G.shape[1]}\), got \(1, {G.shape[1] - 1}\)"):
        part.rule(part.phi, G[:, 1:])


def test_custom_activation():
    model = network()
    kfo = randomise(KFO(model.parameters(), hidden_layers=1, activation=torch.sin))
    grads = random_grads(model)
    for update, expected in zip(kfo.transform(grads), explicit(kfo, grads)):
        torch.testing.assert_close(update, expected)


def test_scale_decides_whether_small_gradients_see_an_activation():
    model = network()
    grads = [1e-3 * grad for grad in random_grads(model)]

    def update(**options) -> torch.Tensor:
        torch.manual_seed(1)
        kfo = randomise(KFO(model.parameters(), hidden_layers=1, bias=False, **options))
        return torch.cat([update.flatten() for update in kfo.transform(grads)])

    linear = update(activation=lambda x: x)
    torch.testing.assert_close(update(), linear, rtol=1e-3, atol=1e-8)
    assert (update(scale=1000) - linear).norm() > 0.05 * linear.norm()
    # It cancels where the activation lets it through.
    torch.testing.assert_close(update(scale=1000, activation=lambda x: x), linear, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(update(scale=1000, activation="relu"), update(activation="relu"), rtol=1e-12, atol=1e-15)


def test_no_gradient_no_update():
    model = network()
    kfo = randomise(KFO(model.parameters(), bias=True, hidden_layers=1))
    grads = random_grads(model)
    full = kfo.transform(grads)
    grads[1] = None
    for i, (update, expected) in enumerate(zip(kfo.transform(grads), full)):
        if i == 1:
            assert update is None
        else:
            torch.testing.assert_close(update, expected)
    assert kfo.transform([None] * 6) == [None] * 6


def test_forward_differentiates_and_transforms():
    model = network()
    kfo = randomise(KFO(model.named_parameters()))
    grads = torch.autograd.grad(network_loss(model), list(model.parameters()))
    for update, expected in zip(kfo(network_loss(model), model.parameters()), kfo.transform(grads)):
        assert torch.equal(update, expected)


def test_second_order_through_forward():
    model = network()
    kfo = randomise(KFO(model.named_parameters()))
    updates = kfo(network_loss(model), model.parameters(), create_graph=True)
    wanted = [*model.parameters(), *kfo.parameters()]
    grads = torch.autograd.grad(sum((u**2).sum() for u in updates), wanted)
    first = torch.autograd.grad(network_loss(model), list(model.parameters()), create_graph=True)
    expected = torch.autograd.grad(sum((u**2).sum() for u in explicit(kfo, first)), wanted)
    for grad, other in zip(grads, expected):
        torch.testing.assert_close(grad, other)


def test_unused_and_frozen_parameters_are_named():
    model = network()
    model.spare = nn.Linear(2, 2).to(DTYPE)
    kfo = KFO(model.named_parameters())
    with pytest.raises(ValueError, match=r"'spare\.weight'.*allow_unused=True"):
        kfo(network_loss(model), model.parameters())
    assert kfo(network_loss(model), model.parameters(), allow_unused=True)[-2:] == [None, None]
    model.spare.requires_grad_(False)
    model.conv.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'conv\.weight'.*allow_nograd=True"):
        kfo(network_loss(model), model.parameters())
    updates = kfo(network_loss(model), model.parameters(), allow_nograd=True)
    assert [update is None for update in updates] == [True, False, False, False, False, False, True, True]


def test_bad_losses():
    model = network()
    kfo = KFO(model.parameters())
    with pytest.raises(ValueError, match="loss: expected a scalar"):
        kfo(torch.ones(2, requires_grad=True), model.parameters())
    with pytest.raises(ValueError, match="loss: does not depend on any parameter"):
        kfo(torch.ones(()), model.parameters())
    with pytest.raises(TypeError, match="loss: expected a tensor, got float"):
        kfo(1.0, model.parameters())
    with pytest.raises(TypeError, match=r"loss: expected a tensor, got str: .*value"):
        kfo("cross_entropy", model.parameters())
    with pytest.raises(TypeError, match=r"loss: expected a tensor, got \w+: .*value"):
        kfo(nn.functional.cross_entropy, model.parameters())
    with pytest.raises(TypeError, match=r"loss: expected a real floating-point number, got torch\.complex128"):
        kfo(network_loss(model) * 1j, model.parameters())


def test_a_part_of_the_parameters_or_too_many_are_named():
    model = network()
    head = KFO(model.head.named_parameters())
    message = (
        r"parameters: expected 2 tensors, as given to the constructor: 'weight' \(4, 3\), 'bias' \(4,\); got 6: "
        r"no factors for \[0\] \(3, 2, 2, 3\), \[1\] \(3,\), \[2\] \(3,\) and 1 more. .*A KFO may be for a part of"
    )
    with pytest.raises(ValueError, match=message):
        head(network_loss(model), model.parameters())
    whole = KFO(model.named_parameters())
    with pytest.raises(ValueError, match=r"got 5: missing 'conv\.weight' \(3, 2, 2, 3\)\."):
        whole(network_loss(model), list(model.parameters())[1:])
    with pytest.raises(ValueError, match=r"got 2: missing 'conv\.weight' .*'norm\.weight' \(3,\) and 1 more\. .*part"):
        whole(network_loss(model), model.head.parameters())
    with pytest.raises(ValueError, match=r"got 3: missing .*; no factors for \[1\] \(7, 7\)\."):
        whole(network_loss(model), [model.head.weight, torch.ones(7, 7), model.head.bias])
    with pytest.raises(ValueError, match=r"parameters\['conv\.weight'\]: expected shape.*order"):
        whole(network_loss(model), list(model.parameters())[::-1])
    with pytest.raises(ValueError, match=r"grads: expected 2 tensors, one per parameter: 'weight' \(4, 3\).*got 6"):
        head.transform(random_grads(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: model, r"Net: pass its \.parameters\(\)"),
        (lambda model: model.head.weight, "one Parameter: put it in a list"),
        (lambda model: None, "NoneType"),
        (lambda model: "head", "str"),
    ],
)
def test_what_is_no_list_of_tensors(given, message):
    model = network()
    kfo = KFO(model.named_parameters())
    with pytest.raises(TypeError, match=f"parameters: expected an iterable of tensors, got {message}"):
        kfo(network_loss(model), given(model))
    with pytest.raises(TypeError, match=f"grads: expected an iterable of tensors, got {message}"):
        kfo.transform(given(model))


def test_names_that_are_missing_or_unknown_or_that_nobody_gave():
    model = network()
    kfo, parameters = KFO(model.named_parameters()), dict(model.named_parameters())
    grads = dict(zip(parameters, random_grads(model)))
    short = {name: grad for name, grad in grads.items() if name != "norm.bias"}
    renamed = {f"0.{name}": grad for name, grad in grads.items()}
    message = r"expected one tensor for each of 'conv\.weight' \(3, 2, 2, 3\), .*; got "
    for call, argument in (
        (kfo.transform, "grads"),
        (lambda given: kfo(network_loss(model), given), "parameters"),
    ):
        for given, wrong in (
            (short, r"missing 'norm\.bias'$"),
            ({**grads, "extra": torch.ones(1)}, "unknown 'extra'$"),
            (renamed, r"missing 'conv.weight', .* and 3 more; unknown '0.conv.weight', .* and 3 more$"),
            ({}, "missing 'conv.weight'"),
        ):
            with pytest.raises(ValueError, match=f"{argument}: {message}{wrong}"):
                call(given)
    unnamed = KFO(model.parameters())
    for call in (unnamed.transform, lambda given: unnamed(network_loss(model), given)):
        with pytest.raises(ValueError, match=r"expected a list, got a dict: .*made of tensors without names; .*pairs"):
            call(parameters)
    # Names that look like positions are names too.
    KFO([("0", torch.ones(2)), ("1", torch.ones(2))]).transform({"1": torch.ones(2), "0": torch.zeros(2)})


def test_lists_of_what_are_no_tensors():
    model = network()
    kfo = KFO(model.named_parameters())
    for given in (list(model.named_parameters()), [p.detach().numpy() for p in model.parameters()]):
        kind = type(given[0]).__name__
        with pytest.raises(TypeError, match=rf"parameters\[0\]: expected a tensor, got {kind}"):
            kfo(network_loss(model), given)
        with pytest.raises(TypeError, match=rf"grads\['conv\.weight'\]: expected a tensor or None, got {kind}"):
            kfo.transform(given)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [("deep", torch.ones(1, 2, 1, 1, 1, 3))], ValueError, r"'deep': expected 1 .*, got 6: \(1, 2, 1, "),
        (lambda: [torch.ones(())], ValueError, "parameter '0': .*got 0"),
        (lambda: [torch.ones(0, 3)], ValueError, "at least one element"),
        (list, ValueError, "at least one parameter"),
        (lambda: [3.0], TypeError, r"parameters\[0\]: expected a tensor"),
        (lambda: torch.ones(3), TypeError, "parameters: expected an iterable.*got one Tensor.*at once"),
        (lambda: nn.Linear(2, 2), TypeError, r"parameters: .*pairs, got Linear: pass its \.named_parameters\(\)"),
        (lambda: nn.Linear(2, 2).state_dict(), TypeError, r"parameters: .*got OrderedDict: pass its \.items\(\)"),
        (lambda: None, TypeError, "parameters: expected an iterable.*got NoneType"),
        (lambda: 3, TypeError, "parameters: expected an iterable.*got int"),
        (lambda: nn.Linear(2, 2).named_modules(), TypeError, r"parameters\[0\]: .*got \(str, Linear\)"),
        (lambda: [torch.ones(2, 2).numpy()], TypeError, r"parameters\[0\]: .*got ndarray"),
        (lambda: [torch.ones(2), torch.ones(2).half()], TypeError, r"'1': expected torch\.float32.*float16: convert"),
        (lambda: [torch.ones(2).to(torch.float8_e5m2)], TypeError, "'0': expected float32, float64, float16 or bf"),
        (lambda: [torch.ones(2) * 1j], TypeError, "parameter '0': expected a floating-point"),
        (lambda: [("a", torch.ones(1)), ("a", torch.ones(1))], ValueError, "'a' occurs twice"),
        (lambda: [torch.ones(2), torch.ones(2).double()], TypeError, "parameter '1': expected torch.float32"),
        (lambda: [torch.ones(2), torch.ones(2, device="meta")], ValueError, "parameter '1': expected device cpu"),
        (lambda: [torch.ones(2, dtype=torch.int64)], TypeError, "parameter '0': expected a floating-point"),
    ],
)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        KFO(make())


def tokens_model() -> nn.Module:
    """Parameters of three and five dimensions that are no image convolutions, and one of none, which has no factors."""
    model = network()
    model.tokens, model.volume = nn.Parameter(torch.ones(1, 2, 3).double()), nn.Conv3d(1, 1, 2).double()
    model.scale = nn.Parameter(torch.ones(()).double())
    return model


def test_only_leaves_any_shape_to_gradient_descent():
    named = dict(tokens_model().named_parameters())
    with pytest.raises(
        ValueError,
        match=r"parameter 'scale': expected 1 .*only=\[\.\.\.\] of KFO and LowRank leaves it to gradient descent",
    ):
        KFO(named.items())
    with pytest.raises(ValueError, match="parameter 'scale': expected 1 "):
        KFO(named.items(), only=["head.*", "scale"])
    kfo = randomise(KFO(named.items(), only=["head.*", "conv.weight"], hidden_layers=1))
    assert repr(kfo).startswith("KFO(\n  parameters=3 of 10")
    grads = {other: torch.randn(p.shape, dtype=DTYPE) for other, p in named.items()}
    updates = kfo.transform(grads)
    alone = KFO(
        [(other, named[other]) for other in named if other.startswith(("head", "conv.weight"))], hidden_layers=1
    )
    alone.load_state_dict({key: value for key, value in kfo.state_dict().items() if "extra" not in key}, strict=False)
    expected = alone.transform({other: grads[other] for other in alone.packing.names})
    for other, update in updates.items():
        assert torch.equal(update, expected.get(other, grads[other]))
    assert [pair == (None, None) for pair in kfo.factors()] == [other not in expected for other in named]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"only": "head.*"}, TypeError, "only: expected a list of names or patterns .*got str: put it in a list"),
        ({"only": 3}, TypeError, "only: expected a list .*got int"),
        ({"only": [3]}, TypeError, r"only\[0\]: expected a name or a pattern, got int"),
        ({"only": []}, ValueError, "only: expected at least one name"),
        ({"only": ["head.*", "had.*"]}, ValueError, r"only: 'had\.\*' matches no parameter: they are 'conv\.weight', "),
        ({"only": ["Head.*"]}, ValueError, "only: 'Head"),
        ({"max_factor": 0}, ValueError, "max_factor: expected at least 1, got 0"),
        ({"max_factor": 2.0}, TypeError, r"max_factor: expected an integer or None, got 2\.0"),
        ({"max_factor": True}, TypeError, "max_factor: expected an integer or None, got True"),
        (
            {"max_factor": 2, "only": ["head.weight"]},
            ValueError,
            "max_factor: .*leaves a factor, got 2: .*GradientDescent",
        ),
    ],
    ids=str,
)
def test_bad_only_and_max_factor(options, error, message):
    with pytest.raises(error, match=message):
        KFO(network().named_parameters(), **options)


def test_all_by_name_is_the_usual_kfo():
    model, every = network(), [["*"], ["conv.*", "norm.?ias", "*weight", "head.bias"], range(0)]
    kfo = randomise(KFO(model.named_parameters()))
    for only in every[:2]:
        other = KFO(model.named_parameters(), only=only, max_factor=10**6)
        other.load_state_dict(kfo.state_dict())
        assert other.covered.all
        assert other.problems.one_sided is None
        assert other.covered.packing is other.packing
    positions = KFO(list(model.parameters()), only=["4", "5"])
    assert positions.problems.packing.names == ("4", "5")


def test_factors_of_a_side_that_is_too_long_are_none():
    kfo = KFO(network().named_parameters(), max_factor=3, hidden_layers=1)
    shapes = [tuple(None if X is None else tuple(X.shape) for X in pair) for pair in kfo.factors()]
    assert shapes == [
        ((2, 2), None),
        ((3, 3), (1, 1)),
        ((3, 3), (1, 1)),
        ((3, 3), (1, 1)),
        (None, (3, 3)),
        (None, (1, 1)),
    ]
    # The last layer starts as the zero map by whichever factor there is.
    assert [(R is None or not R.any()) and (R is not None or not L.any()) for R, L in kfo.factors(1)] == [True] * 6


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"hidden_layers": -1}, "hidden_layers: expected an integer of at least 0, got -1"),
        ({"hidden_layers": 1.5}, "hidden_layers"),
        ({"activation": "swoosh"}, "activation: expected a function or one of tanh"),
        ({"backend": "fpga"}, "backend: expected one of auto"),
        ({"scale": 2.0}, "scale: expected 1 without hidden layers, .*got 2.0: set hidden_layers"),
        *(
            (
                {"scale": value, "hidden_layers": 1},
                f"scale: expected a finite .*float32.*, got {value}$",
            )
            for value in (0, -2.0, math.inf, math.nan, 2**128, 10**400, 1e-39)
        ),
    ],
    ids=str,
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        KFO([torch.ones(2)], **option)


@pytest.mark.parametrize("option", [{"psd": "no"}, {"psd": None}, {"bias": 1}, {"bias": "False"}], ids=str)
def test_options_that_are_no_flags(option):
    with pytest.raises(TypeError, match=f"{next(iter(option))}: expected True"):
        KFO([torch.ones(2)], **option)


@pytest.mark.parametrize("scale", [True, "2", None, torch.ones(()), 2j], ids=str)
def test_a_scale_that_is_no_number(scale):
    with pytest.raises(TypeError, match="scale: expected a number, got "):
        KFO([torch.ones(2)], hidden_layers=1, scale=scale)


def test_bad_gradients():
    model = network()
    kfo = KFO(model.named_parameters())
    good = random_grads(model)
    with pytest.raises(ValueError, match=r"grads: expected 6 tensors, one per parameter: .*got 5"):
        kfo.transform(good[:5])
    with pytest.raises(ValueError, match=r"grads\['conv.weight'\]: expected shape \(3, 2, 2, 3\)"):
        kfo.transform([good[0][:1], *good[1:]])
    with pytest.raises(ValueError, match=r"grads\['conv.bias'\]: expected the task dimension"):
        kfo.transform([good[0][None], *good[1:]])
    with pytest.raises(
        TypeError, match=r"grads: expected torch\.float64 as the meta-parameters have, got torch\.float32"
    ):
        kfo.transform([grad.float() for grad in good])
    with pytest.raises(TypeError, match=r"grads\['conv.bias'\]: expected torch.float64"):
        kfo.transform([good[0], good[1].float(), *good[2:]])
    with pytest.raises(ValueError, match="grads: expected device cpu"):
        kfo.transform([grad.to("meta") for grad in good])
    with pytest.raises(TypeError, match=r"grads\['conv.weight'\]: expected a tensor or None, got list"):
        kfo.transform([[1.0], *good[1:]])


def test_factors_are_live_views():
    model = network()
    kfo = KFO(model.named_parameters(), hidden_layers=1)
    for layer in range(2):
        pairs = kfo.factors(layer)
        assert [(tuple(R.shape), tuple(L.shape)) for R, L in pairs] == [
            ((p, p), (q, q)) for _, p, q in kfo.problems.shapes
        ]
    assert all(
        torch.equal(R, torch.eye(len(R), dtype=DTYPE)) and torch.equal(L, torch.eye(len(L), dtype=DTYPE))
        for R, L in kfo.factors()
    )
    assert all(not R.any() for R, _ in kfo.factors(1))
    with torch.no_grad():
        kfo.factors()[2][0].fill_(7)
    assert torch.equal(kfo.factors()[2][0], torch.full((3, 3), 7, dtype=DTYPE))
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        kfo.factors(2)


def test_state_dict_round_trip(tmp_path):
    kfo = randomise(KFO(network().named_parameters(), bias=True, hidden_layers=1))
    torch.save(kfo.state_dict(), tmp_path / "kfo.pt")
    other = KFO(network().named_parameters(), bias=True, hidden_layers=1)
    other.load_state_dict(torch.load(tmp_path / "kfo.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(kfo.parameters(), other.parameters()))


def test_state_dict_of_other_shapes_is_refused_before_anything_is_copied():
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, (2, 3))
            self.norm = nn.BatchNorm2d(3)
            self.head = nn.Linear(4, 3)

    kfo = randomise(KFO(network().named_parameters()))
    other = KFO(Swapped().to(DTYPE).named_parameters())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"parameter 'head.weight' of shape \(3, 4\).*\(4, 3\)"):
        other.load_state_dict(kfo.state_dict())
    assert all(torch.equal(other.state_dict()[key], before[key]) for key in before if torch.is_tensor(before[key]))
    with pytest.raises(ValueError, match="expected meta-parameters of 2 parameters, got 6"):
        KFO(list(network().parameters())[:2]).load_state_dict(kfo.state_dict())
    with pytest.raises(ValueError, match="psd=False, got psd=True"):
        KFO(network().parameters(), psd=False).load_state_dict(kfo.state_dict())


def test_state_dict_of_other_names_or_none_is_refused():
    a, b = torch.ones(3), torch.ones(3)
    kfo = KFO([("a", a), ("b", b)])
    with pytest.raises(ValueError, match=r"parameter 'b' of shape .*made for 'a'"):
        KFO([("b", b), ("a", a)]).load_state_dict(kfo.state_dict())
    KFO([a, b]).load_state_dict(kfo.state_dict())  # positions name nothing to compare


def test_nested_state_dict_is_checked_too():
    class Holder(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()
            self.kfo = KFO(network().named_parameters(), **options)

    with pytest.raises(ValueError, match="bias"):
        Holder(bias=True).load_state_dict(Holder().state_dict())


def test_moves_and_copies_like_any_module():
    kfo = randomise(KFO(network().named_parameters()))
    grads = random_grads(network())
    for other in (copy.deepcopy(kfo), kfo.float().double()):
        for a, b in zip(other.transform(grads), kfo.transform(grads)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert "parameters=6" in repr(kfo)
