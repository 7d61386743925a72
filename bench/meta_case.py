"""One meta-iteration to compute: network, factors and tasks, and the interface of its contenders."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench.user_networks import ResNet, dense_network
from kfo_ext import KFO
from kfo_ext.networks import CNN
from kfo_ext.tasks import Examples, Glyphs, TaskBatch
from kfo_ext.tasks.batch import generator_for

METHODS = ("kfo", "maml")
WAYS, SHOTS, QUERIES = 5, 5, 5
# Standard deviation of the noise around each class's own image.
NOISE = 0.2

Gradients = list[Tensor]


class Runs(Protocol):
    """A computation that can be timed, and its memory measured."""

    def run(self) -> Tensor | float:
        """Compute the mean query loss and all meta-gradients; returns the loss once everything is complete."""
        ...


class Contender(Runs, Protocol):
    """An implementation of a case's meta-iteration."""

    def gradients(self) -> Gradients:
        """Gradients of the last run: one per parameter of the network, then with factors dR and dL per parameter."""
        ...


@dataclass(frozen=True)
class Network:
    """A CNN of the paper without pooling, its head on the spatial mean: the arguments of `kfo_ext.networks.CNN`.

    Attributes:
        layers: the number of convolutions.
        in_channels: channels of an image.
        image_size: height and width of an image, in pixels.
        stride: of each convolution.
        hidden: channels of each layer.
        ways: classes of a task.
        normal_head: as for `kfo_ext.networks.CNN`.
        form: cnn, or of `user_networks` resnet (widths doubling from `hidden`) or dense.
    """

    layers: int
    in_channels: int
    image_size: int
    stride: int
    hidden: int = 32
    ways: int = WAYS
    normal_head: bool = False
    form: str = "cnn"

    def make(self) -> nn.Module:
        """The network, at its random initialization."""
        if self.form == "resnet":
            return ResNet(self.in_channels, tuple(self.hidden << layer for layer in range(self.layers)), self.ways)
        if self.form == "dense":
            return dense_network(self.in_channels * self.image_size**2, self.hidden, self.ways)
        return CNN(**{name: value for name, value in asdict(self).items() if name != "form"})


NETWORKS = {
    f"{name}_cnn{layers}": Network(layers, in_channels, image_size, stride, normal_head=normal_head)
    for name, in_channels, image_size, stride, normal_head in (
        ("omniglot", 1, 28, 2, True),
        ("cifar_fs", 3, 32, 1, False),
    )
    for layers in (2, 3, 4, 6)
} | {
    "user_resnet12": Network(4, 3, 32, 1, hidden=8, form="resnet"),
    "user_mlp": Network(4, 1, 28, 1, hidden=64, form="dense"),
}


class MetaCase(NamedTuple):
    """The operands of one meta-iteration; contenders copy what they change.

    Attributes:
        network: the sizes of `model`.
        model: the network at its initialization.
        factors: for MAML + linear KFO (psd, adapted), (R (p, p), L (q, q)) per parameter; None for plain MAML.
        batch: images and labels.
        lr: inner learning rate.
        steps: inner steps.
    """

    network: Network
    model: nn.Module
    factors: list[tuple[Tensor, Tensor]] | None
    batch: TaskBatch
    lr: float
    steps: int


def make_case(
    network: Network,
    method: str,
    *,
    tasks: int,
    steps: int,
    lr: float = 0.1,
    shots: int = SHOTS,
    queries: int = QUERIES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MetaCase:
    """Make a case with the same values in every call, rounded to the dtype.

    Args:
        network: sizes of the network.
        method: one of `METHODS`.
        tasks: tasks of the meta-batch.
        steps: inner steps.
        lr: inner learning rate.
        shots: support examples per class.
        queries: query examples per class.
        dtype: of all tensors.
        device: of all tensors.

    Returns:
        The case.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    torch.manual_seed(0)
    model = network.make().to(device, dtype)
    if network.in_channels == 1:
        batch = Glyphs("train", ways=network.ways, shots=shots, queries=queries).sample(0, tasks)
    else:
        batch = class_images(network, tasks, shots, queries)
    factors = random_factors(model) if method == "kfo" else None
    return MetaCase(network, model, factors, batch.to(device, dtype), lr, steps)


def random_factors(model: nn.Module, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Non-symmetric factors near the identity, one (R, L) per parameter."""
    factors = KFO(model.named_parameters()).factors()
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(X.detach() + 0.05 * torch.randn(X.shape, generator=generator).to(X) for X in pair) for pair in factors
    ]


def class_images(network: Network, tasks: int, shots: int, queries: int, seed: int = 0) -> TaskBatch:
    """Tasks of random images in [0, 1]: each class has its own image with 4x4 patches, plus noise."""
    generator = generator_for(seed, "class_images")
    coarse = (tasks, network.ways, network.in_channels, -(-network.image_size // 4), -(-network.image_size // 4))
    patches = torch.rand(coarse, generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)
    classes = patches[..., : network.image_size, : network.image_size]

    def examples(each: int) -> Examples:
        images = classes.repeat_interleave(each, 1)
        noise = NOISE * torch.randn(images.shape, generator=generator)
        return Examples(
            (images + noise).clamp(0, 1), torch.arange(network.ways).repeat_interleave(each).repeat(tasks, 1)
        )

    return TaskBatch(examples(shots), examples(queries))


class BatchNorm(nn.BatchNorm2d):
    """torch's batch norm with batch statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)


class SpatialMean(nn.Module):
    """(n, channels, h, w) -> (n, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over height and width."""
        return x.mean(dim=(2, 3))


def plain_network(case: MetaCase, batch_norm: type[nn.Module] = BatchNorm) -> nn.Module:
    """Build the case's network from torch.nn alone, with its parameters in order, as a user would.

    Args:
        case: gives the network and its parameters' values.
        batch_norm: the class of batch norm.

    Returns:
        The network.

    Raises:
        ValueError: another batch norm is given for a network that is not a CNN.
        AssertionError: a parameter has another shape than the case's.
    """
    network, blocks = case.network, []
    if network.form != "cnn":
        if batch_norm is not BatchNorm:
            raise ValueError(f"batch_norm: only a CNN is built with {batch_norm.__name__}, not a {network.form}")
        return copy.deepcopy(case.model)
    for layer in range(network.layers):
        channels = network.hidden if layer else network.in_channels
        blocks += [
            nn.Conv2d(channels, network.hidden, 3, stride=network.stride, padding=1),
            batch_norm(network.hidden),
            nn.ReLU(),
        ]
    model = nn.Sequential(*blocks, SpatialMean(), nn.Linear(network.hidden, network.ways))
    model.to(case.batch.support.x.device, case.batch.support.x.dtype)
    with torch.no_grad():
        for into, parameter in zip(model.parameters(), case.model.parameters(), strict=True):
            if into.shape != parameter.shape:
                raise AssertionError(
                    f"the plain network has {tuple(into.shape)} where ours has {tuple(parameter.shape)}"
                )
            into.copy_(parameter)
    return model


def full_float32() -> None:
    """Switch TF32 off in the process: on a GPU float32 convolutions and products would round to 10 bits."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def flat(gradients: Gradients) -> Tensor:
    """All gradients as one float64 vector on the CPU."""
    return torch.cat([gradient.detach().double().reshape(-1).cpu() for gradient in gradients])
