"""Seeded random learners against plain torch in float64: MAML and ANIL, networks, losses, options.

    python python_tests/fuzz_maml.py --cases 5000 [--first 0]

Each case draws a network (generated; modules shared, hooked, frozen, exchanged), a loss (ignored labels, weights,
smoothing, one's own), options and a batch of odd sizes, and compares route="auto" and route="loop" with `plain_maml`:
loss, query losses, accuracies, and gradients by all that is meta-learned.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from functools import partial

import torch
from plain_maml import assert_equal_truth, plain_kfo, plain_maml, right_weight_norm
from torch import nn
from torch.nn import functional as F

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, TaskBatch

DTYPE = torch.float64


class Whole(nn.Module):
    """A body and a linear head, as ANIL wants them."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.again = inner, inner

    def forward(self, x):
        return x + self.again(torch.tanh(self.inner(x)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


def cnn(rng: random.Random, ways: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Our own network, with up to two of what users do to a network."""
    channels, size, pool = rng.choice([1, 2, 3]), rng.choice([5, 7, 8, 9, 11]), rng.choice([1, 1, 2])
    model = CNN(
        rng.choice([1, 2, 2]),
        in_channels=channels,
        hidden=rng.choice([1, 3, 4]),
        ways=ways,
        image_size=size,
        stride=rng.choice([1, 2]) if pool == 1 else 1,
        pool=pool,
        mean=rng.random() < 0.5,
    )
    for change in rng.sample(CHANGES, rng.choice([0, 0, 1, 2])):
        change(rng, model)
    return model, (channels, size, size)


def _other_norm(rng, model):
    hidden = model.blocks[-1].conv.out_channels
    norms = [
        lambda: nn.GroupNorm(1, hidden),
        lambda: nn.BatchNorm2d(hidden),
        lambda: nn.BatchNorm2d(hidden, affine=False, track_running_stats=False),
        lambda: nn.InstanceNorm2d(hidden, affine=True),
        lambda: nn.Identity(),
    ]
    model.blocks[-1].norm = rng.choice(norms)()


def _no_norm_bias(rng, model):
    if isinstance(model.blocks[0].norm, nn.BatchNorm2d):
        model.blocks[0].norm.register_parameter("bias", None)


def _shared_norm(rng, model):
    model.blocks[-1].norm = model.blocks[0].norm


def _shared_conv(rng, model):
    first, last = model.blocks[0].conv, model.blocks[-1].conv
    if first.weight.shape == last.weight.shape:
        last.weight = first.weight


def _hook(rng, model):
    rng.choice(list(model.modules())).register_forward_hook(lambda module, inputs, output: 1.1 * output)


def _pre_hook(rng, model):
    model.blocks[0].conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))


def _frozen(rng, model):
    rng.choice(list(model.parameters())).requires_grad_(False)


def _method(rng, model):
    features = model.features
    model.features = lambda x: 0.9 * features(x)


def _no_conv_bias(rng, model):
    model.blocks[0].conv.bias = None


def _head(rng, model):
    width, ways = model.head.in_features, model.head.out_features
    model.head = rng.choice([nn.Linear(width, ways, bias=False), nn.Sequential(nn.Linear(width, ways), nn.Tanh())])


CHANGES = [
    _other_norm,
    _no_norm_bias,
    _shared_norm,
    _shared_conv,
    _hook,
    _pre_hook,
    _frozen,
    _method,
    _no_conv_bias,
    _head,
]


def mlp(rng: random.Random, ways: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Dense layers of any kind, some under several names."""
    width = rng.choice([1, 3, 5])
    kinds = [
        lambda: nn.Linear(width, width),
        lambda: nn.Linear(width, width, bias=False),
        lambda: Residual(nn.Linear(width, width)),
        lambda: nn.LayerNorm(width),
        lambda: nn.BatchNorm1d(width, track_running_stats=rng.random() < 0.5),
        lambda: nn.Sequential(nn.Linear(width, width), nn.GELU()),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
        lambda: nn.Unflatten(1, (width, 1)),
        lambda: Attention(width),
    ]
    layers: list[nn.Module] = []
    for _ in range(rng.choice([0, 1, 2, 3])):
        layer = rng.choice(kinds)()
        layers += [nn.Flatten()] if isinstance(layer, nn.Unflatten) else [layer, nn.Tanh()]
    if layers and rng.random() < 0.4:
        layers.append(rng.choice(layers))
    head = nn.Linear(width, ways)
    if len(layers) > 1 and type(layers[0]) is type(layers[-1]) is nn.Linear:
        layers[-1].weight = layers[0].weight
    if not layers and rng.random() < 0.5:
        return head, (width,)
    return Whole(nn.Sequential(*layers), head), (width,)


def convolutional(rng: random.Random, ways: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A user's own convolutional network: plain torch modules, odd shapes."""
    channels, hidden = rng.choice([1, 2]), rng.choice([2, 3])
    size = (rng.choice([5, 6, 7]), rng.choice([5, 8]))
    conv = nn.Conv2d(
        channels,
        hidden,
        rng.choice([1, 3, (3, 2)]),
        stride=rng.choice([1, 2, (2, 1)]),
        padding=rng.choice([0, 1]),
        padding_mode=rng.choice(["zeros", "zeros", "circular"]),
        bias=rng.random() < 0.7,
    )
    norm = rng.choice([nn.BatchNorm2d(hidden), nn.GroupNorm(1, hidden), nn.InstanceNorm2d(hidden), nn.Identity()])
    again = nn.Conv2d(hidden, hidden, 3, padding=1, groups=rng.choice([1, hidden]))
    repeat = [again, nn.Tanh()] * rng.choice([0, 1, 2])
    pool = rng.choice([nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2, ceil_mode=True)])
    body = nn.Sequential(conv, norm, nn.Softplus(), *repeat, pool, nn.Flatten())
    width = body(torch.zeros(2, channels, *size)).shape[1]
    return Whole(body, nn.Linear(width, ways)), (channels, *size)


def draw_loss(rng: random.Random, ways: int):
    """(loss or None, how targets are drawn, the ignored target)."""
    weight = torch.rand(ways, dtype=DTYPE) + 0.1
    labels = partial(_labels, ways=ways)
    some = partial(_labels, ways=ways, ignored=-100)
    last = ways - 1
    cross = nn.CrossEntropyLoss
    return rng.choice(
        [
            (None, labels, -100),
            (None, some, -100),
            (F.cross_entropy, some, -100),
            (cross(weight=weight, label_smoothing=0.1), some, -100),
            (cross(ignore_index=last), labels, last),
            (cross(ignore_index=255), partial(_labels, ways=ways, ignored=255), 255),
            (cross(reduction="sum"), labels, -100),
            (partial(F.cross_entropy, ignore_index=last, weight=weight), labels, last),
            (_margin, labels, -100),
            (lambda output, y: F.mse_loss(torch.tanh(output), y), partial(_floats, ways=ways), None),
            (F.cross_entropy, partial(_probabilities, ways=ways), None),
        ]
    )


def _margin(output, y):
    return F.softplus(1 + output - output.gather(1, y[:, None])).mean()


def _labels(shape, ways: int, ignored: int | None = None):
    y = torch.randint(0, ways, shape)
    if ignored is not None and shape[1] > 1:
        y[:, 1:][torch.rand(shape[0], shape[1] - 1) < 0.4] = ignored
    # A loss that ignores the last class has a target that counts.
    y[:, 0] = 0
    return y


def _floats(shape, ways: int):
    return torch.randn(*shape, ways, dtype=DTYPE)


def _probabilities(shape, ways: int):
    return torch.randn(*shape, ways, dtype=DTYPE).softmax(-1)


def run_case(seed: int) -> str:
    """Compares one case with plain torch; what it was, for a count. Raises AssertionError where they differ."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ways, tasks = rng.choice([2, 3, 5]), rng.choice([1, 2, 3])
    kind = rng.choice([cnn, cnn, mlp, convolutional])
    model, shape = kind(rng, ways)
    model.to(DTYPE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    loss, targets, ignored = draw_loss(rng, ways)
    learner = ANIL if hasattr(model, "features") and rng.random() < 0.4 else MAML
    adapted = model.head if learner is ANIL else model
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        return "nothing to adapt"
    counts = [rng.choice([2, 3, 5, 7]) for _ in range(2)]

    def examples(count: int) -> Examples:
        return Examples(torch.randn(tasks, count, *shape, dtype=DTYPE), targets((tasks, count)))

    batch = TaskBatch(*map(examples, counts))
    options = {"lr": rng.choice([0.05, 0.2]), "steps": rng.choice([1, 2, 3]), "first_order": rng.random() < 0.2}
    kfo = rule = None
    phi: tuple = ()
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    only = None
    if learner is MAML and rng.random() < 0.4:
        trained = rng.sample(trained, rng.randint(1, len(trained)))
        trained = [(name, p) for name, p in adapted.named_parameters() if any(p is chosen for _, chosen in trained)]
        only = {name for name, _ in trained}
    if rng.random() < 0.5 and all(1 <= p.dim() <= 5 for _, p in trained):
        layers = rng.choice([0, 0, 1])
        settings = {"psd": rng.random() < 0.5, "bias": rng.random() < 0.5}
        kfo = KFO(trained, hidden_layers=layers, **settings)
        phi, rule = kfo.phi, plain_kfo(layers=layers + 1, **settings)
        for row in phi:
            row.data += 0.1 * torch.randn_like(row)
        options["adapt_update"] = not options["first_order"] and rng.random() < 0.5
    head = learner is ANIL
    plain = F.cross_entropy if loss is None else loss
    with right_weight_norm():
        truth = plain_maml(model, batch, plain, head=head, only=only, rule=rule, phi=phi, **options)
    flags = {"allow_nograd": True, "allow_unused": True, "checkpoint": rng.random() < 0.2, "update": kfo, "loss": loss}
    if only is not None:
        # By all the names of a tied parameter.
        flags["adapted"] = [
            name
            for name, p in model.named_parameters(remove_duplicate=False)
            if any(p is chosen for _, chosen in trained)
        ]
    taken = ""
    for route in ("auto", "loop"):
        built = learner(model, route=route, **options, **flags)
        assert_equal_truth(built, batch, truth, tolerance=1e-8)
        accuracies = built(batch).metrics
        taken = taken or ("vmap" if built.route == "vmap" else "loop")
        if ignored is None:
            assert accuracies is None
        else:
            expected = [
                (output.argmax(1) == y)[y != ignored].double().mean() for output, y in zip(truth.outputs, batch.query.y)
            ]
            assert torch.allclose(accuracies.double(), torch.stack(expected), rtol=0, atol=1e-6, equal_nan=True)
    return f"{learner.__name__} of {kind.__name__}, {taken}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts, failed = Counter(), []
    for seed in range(arguments.first, arguments.first + arguments.cases):
        try:
            counts[run_case(seed)] += 1
        except Exception as error:  # noqa: PERF203  every case is tried
            failed.append(seed)
            sys.stderr.write(f"seed {seed}: {type(error).__name__}: {error}\n")
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:6d} {name}\n")
    sys.stdout.write(f"{len(failed)} of {arguments.cases} cases failed{f': seeds {failed}' if failed else ''}\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
