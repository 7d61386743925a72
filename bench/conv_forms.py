"""The convolution of all tasks, each with its own weights, in every formulation: ours, and those of torch.

    python bench/conv_forms.py --out conv_forms.json

writes that file and a Markdown table beside it. It measures each layer of a network in the three orders of second-order
meta-learning:

    forward            y
    backward           dx and dweight, with their graph, as in an inner step
    double_backward    their gradients by x, weight and dy

Images need no gradient, so the first layer has only dweight, and its gradient by dy. Every contender gets operands in
its best layout, and is compared with float64 before it is timed; a wrong or failing one gets a row with the reason.
Tasks are grouped as in a meta-iteration (`kfo_ext.adapt.routes.tasks_at_once`); a call computes the whole group.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from bench.meta_case import NETWORKS, SHOTS, WAYS, Network, full_float32
from kfo_ext.adapt.routes import LARGEST_TENSOR
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.measure import TOLERANCE, one_line
from kfo_ext.bench.result import Row, facts_of, provenance, write_result
from kfo_ext.bench.timing import interleaved, rested
from kfo_ext.functional import conv2d
from kfo_ext.machine import keep_freed_memory
from kfo_ext.ops import library
from kfo_ext.testing import relative_error

IMAGES = WAYS * SHOTS
# For every convolution of `kfo_ext.networks.CNN`.
KERNEL, PADDING = 3, 1
# The names of each order's outputs, and those of a first layer.
OUTPUTS = {
    "forward": ("y",),
    "backward": ("dx", "dweight"),
    "double_backward": ("second_x", "second_weight", "second_dy"),
}
FIRST_OUTPUTS = {"forward": ("y",), "backward": ("dweight",), "double_backward": ("second_dy",)}
WEIGHTS = ("dweight", "second_weight")
LEGEND = """\
- ours: `kfo_ext.functional.conv2d`, compiled; ours_grouped: its form without kernels, as on CUDA.
- grouped: one convolution of torch, a group of channels for each task, channels last.
- loop: a convolution of torch for each task, channels last; operands and results stay apart.
- grouped_closed, loop_closed: these, with every derivative a convolution or `convolution_backward`, not torch's own.
- vmap: `torch.func.vmap` of torch's convolution, channels first, with autograd on top.
- patches: `unfold`, channels first, and one batched product.
"""

Orders = dict[str, Callable[[], Sequence[Tensor]]]


class Layer(NamedTuple):
    """One convolution of a network; images are `size` x `size`."""

    first: bool
    in_channels: int
    size: int
    out_channels: int
    stride: int

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * PADDING - KERNEL) // self.stride + 1

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        """The names of each order's outputs."""
        return FIRST_OUTPUTS if self.first else OUTPUTS

    def __str__(self) -> str:
        return f"{self.in_channels}x{self.size}x{self.size} to {self.out_channels}x{self.out_size}x{self.out_size}"


class Operands(NamedTuple):
    """Images x, dy, ddx: (tasks, n, h, w, channels); weights: (tasks, out, in, 3, 3); ddx, ddweight: cotangents."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    ddx: Tensor
    ddweight: Tensor


class Layout(NamedTuple):
    """Conversions of images and weights from `Operands` to a contender's layout, and back given a task's channels."""

    images: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor], Tensor]
    images_back: Callable[[Tensor, int], Tensor]
    weights_back: Callable[[Tensor, int], Tensor]


AS_THEY_ARE = Layout(lambda X: X, lambda X: X, lambda X, channels: X, lambda X, channels: X)
# (n, tasks, channels, h, w).
CHANNELS_FIRST = AS_THEY_ARE._replace(
    images=lambda X: X.permute(1, 0, 4, 2, 3).contiguous(),
    images_back=lambda X, channels: X.permute(1, 0, 3, 4, 2),
)
# (n, tasks * channels, h, w) and (tasks * out, in, 3, 3), in torch's channels_last.
ONE_CONVOLUTION = Layout(
    lambda X: X.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2),
    lambda X: X.flatten(0, 1).contiguous(memory_format=torch.channels_last),
    lambda X, channels: X.unflatten(1, (-1, channels)).permute(1, 0, 3, 4, 2),
    lambda X, channels: X.unflatten(0, (-1, channels)),
)


def torch_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve by torch's conv2d, with as many groups of channels as x holds."""
    return F.conv2d(x, weight, stride=stride, padding=PADDING, groups=x.shape[1] // weight.shape[1])


def vmapped(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve by torch's conv2d under vmap, differentiated by autograd outside."""
    return torch.func.vmap(partial(torch_conv, stride=stride), in_dims=(1, 0), out_dims=1)(x, weight)


def patches(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve by unfolding every pixel's patch, and one batched product."""
    columns = F.unfold(x.flatten(0, 1), KERNEL, padding=PADDING, stride=stride).unflatten(0, x.shape[:2])
    y = weight.flatten(2) @ columns
    return y.unflatten(-1, [(n + 2 * PADDING - KERNEL) // stride + 1 for n in x.shape[3:]])


class Trilinear(Function):
    """The gradient of <conv2d(x, weight), y> by operand `by` of x, weight, y, of which only the shape is used.

    Each is a call of torch's convolution or convolution_backward, and the gradients of each are the other two.
    """

    @staticmethod
    def forward(ctx, by, stride, x, weight, y):
        """The gradient by one operand."""
        ctx.save_for_backward(x, weight, y)
        ctx.by, ctx.stride = by, stride
        if by == 2:
            return torch_conv(x, weight, stride)
        groups, needed = x.shape[1] // weight.shape[1], [by == 0, by == 1, False]
        return torch.ops.aten.convolution_backward(
            y, x, weight, None, [stride] * 2, [PADDING] * 2, [1, 1], False, [0, 0], groups, needed
        )[by]

    @staticmethod
    def backward(ctx, cotangent):
        """The gradients by the other two."""
        operands = list(ctx.saved_tensors)
        operands[ctx.by] = cotangent

        def gradient(by: int) -> Tensor | None:
            if by == ctx.by or not ctx.needs_input_grad[2 + by]:
                return None
            # Without the graph of the operand that gives only the shape.
            return Trilinear.apply(by, ctx.stride, *(X.detach() if i == by else X for i, X in enumerate(operands)))

        return None, None, *map(gradient, range(3))


def closed(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve by torch's conv2d, with every derivative by convolution_backward."""
    return Trilinear.apply(2, stride, x, weight, None)


class Form(NamedTuple):
    """A contender.

    Attributes:
        conv: (x, weight, stride=) -> y of the tasks of a call, in its layout.
        layout: its layout.
        apart: whether each task is a separate call.
    """

    conv: Callable[..., Tensor]
    layout: Layout
    apart: bool = False


PEERS = {
    "grouped": Form(torch_conv, ONE_CONVOLUTION),
    "grouped_closed": Form(closed, ONE_CONVOLUTION),
    "loop": Form(torch_conv, ONE_CONVOLUTION, apart=True),
    "loop_closed": Form(closed, ONE_CONVOLUTION, apart=True),
    "vmap": Form(vmapped, CHANNELS_FIRST),
    "patches": Form(patches, CHANNELS_FIRST),
}
# The reference of the others, in float64 on the CPU.
TRUSTED = PEERS["loop"]


def contenders(device: str) -> dict[str, Form]:
    """The contenders by name; ours is compiled for the CPU, and elsewhere one convolution of torch for all tasks."""
    name, backend = ("ours", "native") if device == "cpu" else ("ours_grouped", "grouped")
    return {name: Form(partial(conv2d, padding=PADDING, backend=backend), AS_THEY_ARE), **PEERS}


def layers_of(network: Network) -> list[Layer]:
    """The convolutions of a network, in order."""
    layers, channels, size = [], network.in_channels, network.image_size
    for number in range(network.layers):
        layers.append(Layer(number == 0, channels, size, network.hidden, network.stride))
        channels, size = network.hidden, layers[-1].out_size
    return layers


def group_size(network: Network, tasks: int, device: str) -> int:
    """The number of tasks in one graph of a meta-iteration: groups of about the same size, as `MAML` forms."""
    if device == "cpu":
        largest = IMAGES * max(layer.out_size**2 * layer.out_channels for layer in layers_of(network)) * 4
        tasks_at_once = min(tasks, max(1, LARGEST_TENSOR // largest))
        return -(-tasks // -(-tasks // tasks_at_once))
    return tasks


def random_operands(layer: Layer, tasks: int) -> Operands:
    """Random operands in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(tasks, *sizes, generator=generator, dtype=torch.float64)

    images = IMAGES, layer.size, layer.size, layer.in_channels
    weights = layer.out_channels, layer.in_channels, KERNEL, KERNEL
    dy = IMAGES, layer.out_size, layer.out_size, layer.out_channels
    return Operands(draw(*images), draw(*weights), draw(*dy), draw(*images), draw(*weights))


def orders_of(form: Form, operands: Operands, layer: Layer, at_once: int) -> Orders:
    """The three orders; the graphs for backward and double_backward are built here."""

    def pieces(X: Tensor, own: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [own(group).detach() for group in X.split(1 if form.apart else at_once)]

    x, dy, ddx = (pieces(X, form.layout.images) for X in (operands.x, operands.dy, operands.ddx))
    weight, ddweight = (pieces(X, form.layout.weights) for X in (operands.weight, operands.ddweight))
    inputs, cotangents, wanted = x + weight, ddx + ddweight, x + weight + dy
    if layer.first:
        inputs, cotangents, wanted = weight, ddweight, dy
    for X in (*inputs, *dy):
        X.requires_grad_()

    def forward() -> Sequence[Tensor]:
        return [form.conv(*piece, stride=layer.stride) for piece in zip(x, weight)]

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(y, inputs, dy, create_graph=True)

    def double_backward() -> Sequence[Tensor]:
        return torch.autograd.grad(gradients, wanted, cotangents, retain_graph=True)

    y = forward()
    gradients = backward()
    return {"forward": forward, "backward": backward, "double_backward": double_backward}


def named(form: Form, layer: Layer, order: str, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs of an order by their names, all tasks in one tensor as in `Operands`, on the CPU."""
    names, back = layer.outputs[order], {}
    for i, name in enumerate(names):
        count = len(outputs) // len(names)
        own = form.layout.weights_back if name in WEIGHTS else form.layout.images_back
        channels = layer.in_channels if name in ("dx", "second_x") else layer.out_channels
        back[name] = torch.cat([own(X.detach(), channels) for X in outputs[i * count : (i + 1) * count]]).cpu()
    return back


def error_of(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float = TOLERANCE) -> float:
    """The largest relative error of an order's outputs; raises AssertionError naming a WRONG output."""
    errors = []
    for name, right in expected.items():
        if actual[name].shape != right.shape:
            raise AssertionError(f"WRONG: {name} is {tuple(actual[name].shape)}, expected {tuple(right.shape)}")
        errors.append(relative_error(actual[name], right))
        # `not <=`, so that a NaN is wrong.
        if not errors[-1] <= allowed:
            raise AssertionError(f"WRONG: {name} is off by {errors[-1]:.1e}, allowed {allowed:.0e}")
    return max(errors)


def measure(layer: Layer, tasks: int, at_once: int, device: str, repeats: int) -> list[Row]:
    """One row per order and contender: error and seconds of all tasks, or the reason for none."""
    operands, forms = random_operands(layer, tasks), contenders(device)
    trusted = orders_of(TRUSTED, operands, layer, at_once)
    expected = {order: named(TRUSTED, layer, order, trusted[order]()) for order in OUTPUTS}
    narrow = Operands(*(X.to(device, torch.float32) for X in operands))

    @cache
    def orders(name: str) -> Orders:
        return orders_of(forms[name], narrow, layer, at_once)

    rows: list[Row] = []
    for order, right in expected.items():
        functions: Orders = {}
        measured: dict[str, Row] = {}
        for name, form in forms.items():
            row = measured[name] = {"order": order, "contender": name, "status": "ok"}
            try:
                call = orders(name)[order]
                row["error"] = error_of(named(form, layer, order, call()), right)
                functions[name] = call
            except Exception as error:  # any error is a finding
                row["status"] = one_line(error)
        timings = interleaved(functions, repeats, sample=rested(finished)) if functions else {}
        for name, timing in timings.items():
            measured[name]["seconds"] = timing._asdict()
        rows += measured.values()
    return rows


def measure_network(name: str, options: argparse.Namespace) -> Row:
    """The rows of all layers of a network."""
    network, rows = NETWORKS[name], []
    at_once = group_size(network, options.tasks, options.device)
    for number, layer in enumerate(layers_of(network), 1):
        measured = measure(layer, options.tasks, at_once, options.device, options.repeats)
        rows += [{"layer": number, "sizes": str(layer)} | row for row in measured]
    return {"network": name, "tasks_at_once": at_once, "rows": rows}


def cells(seconds: Sequence[float | None]) -> list[str]:
    """Milliseconds, the fastest bold; a dash for none."""
    fastest = min((value for value in seconds if value is not None), default=None)
    shown = ["-" if value is None else f"{1e3 * value:.2f}" for value in seconds]
    return [f"**{text}**" if value is not None and value == fastest else text for text, value in zip(shown, seconds)]


def table(entry: Row) -> str:
    """Markdown of one network: a line per layer and order, their sum, and the contenders that were not timed."""
    rows: list[Row] = entry["rows"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    refused = [row for row in rows if row["status"] != "ok"]
    lines: dict[tuple[str, str], list[float | None]] = {}
    for row in rows:
        place = f"{row['layer']}: {row['sizes']}", row["order"].replace("_", " ")
        lines.setdefault(place, []).append(row["seconds"]["median"] if "seconds" in row else None)
    lines["sum", ""] = [None if None in column else sum(column) for column in zip(*lines.values())]
    text = [
        f"### {entry['network']}, {entry['tasks_at_once']} tasks at once",
        "",
        f"| {' | '.join(['layer', 'order', *names])} |",
        "|" + "---|" * (2 + len(names)),
        *(f"| {' | '.join([*place, *cells(seconds)])} |" for place, seconds in lines.items()),
        "",
        *(f"- {row['contender']}, layer {row['layer']}, {row['order']}: {row['status']}" for row in refused),
    ]
    return "\n".join(text).rstrip() + "\n"


def markdown(result: Row) -> str:
    """The origin of the times, the legend of the columns, and a table for each network."""
    settings = result["settings"]
    processor = result["device"] if settings["device"] == "cuda" else result["processor"]
    intro = (
        f"Made by `python bench/{result['command']}` on {processor}, torch {result['torch']}, "
        f"{result['torch_threads']} threads, {provenance(result)}: milliseconds for {settings['tasks']} tasks of "
        f"{IMAGES} images, medians of {settings['repeats']} interleaved repeats.\n"
    )
    return "\n".join([intro, LEGEND, *(table(entry) for entry in result["networks"])])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if ours is wrong anywhere, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=["omniglot_cnn2", "omniglot_cnn4", "cifar_fs_cnn2"]
    )
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes beside it, ending in .md")
    options = parser.parse_args(arguments)
    full_float32()
    facts = facts_of(options) | {"backends": library.status(), "keeps_freed_memory": keep_freed_memory()}
    entries: list[Row] = []
    for network in options.networks:
        entries.append(measure_network(network, options))
        print(table(entries[-1]), flush=True)
        # After each network, so that an interrupted run keeps its results.
        if options.out:
            write_result(options.out, facts | {"networks": entries}, markdown)
    ours = [row for entry in entries for row in entry["rows"] if row["contender"].startswith("ours")]
    return int(any("WRONG" in row["status"] for row in ours))


if __name__ == "__main__":
    raise SystemExit(main())
