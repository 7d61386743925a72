"""Which stage of a meta-iteration an operation belongs to, by its name in torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

ORDERS = ("forward", "backward", "double backward")
OTHER = "other torch operations"


def _of_op(name: str) -> list[tuple[str, str]]:
    """The patterns of our own op's three orders, whatever suffix a backend adds; the most derived first."""
    return [
        ("double backward", rf"kfo_ext::{name}\w*_double_backward\w*"),
        ("backward", rf"kfo_ext::{name}\w*_backward\w*"),
        ("forward", rf"kfo_ext::{name}\w*"),
    ]


_BATCH_NORM = r"(Native|Cudnn|Miopen)?BatchNorm"
_ORDERED = {
    "convolution": [
        ("double backward", r"ConvolutionBackwardBackward\d+|aten::_convolution_double_backward"),
        ("backward", r"ConvolutionBackward\d+|aten::convolution_backward"),
        ("forward", r"aten::_?conv(2d|olution)"),
        # Ours is closed under differentiation: the gradients of conv2d are ops, and nodes with these names in turn.
        ("double backward", r"Conv2d(Input|Weight)Backward"),
        ("backward", r"Conv2dBackward|kfo_ext::conv2d_(input|weight)\w*"),
        *_of_op("conv2d"),
    ],
    "batch norm + ReLU": [
        ("double backward", rf"{_BATCH_NORM}BackwardBackward\d+|ThresholdBackwardBackward\d+"),
        ("backward", rf"{_BATCH_NORM}Backward\d+|(Relu|Threshold)Backward\d+"),
        ("backward", r"aten::(native|cudnn)_batch_norm_backward|aten::threshold_backward"),
        ("forward", r"aten::(native_|cudnn_)?batch_norm|aten::relu_?"),
        *_of_op("batch_norm"),
    ],
    "transform": _of_op("transform"),
}
_HEAD = (
    r"aten::(linear|addmm|baddbmm|mean|cross_entropy_loss|log_softmax|nll_loss(_nd)?)"
    r"|(Addmm|Mm|Baddbmm|Bmm|Mean|LogSoftmax|NllLoss)Backward\d+|(LogSoftmaxBackwardData|NllLossBackward)Backward\d+"
)
STAGES = (*(f"{name}, {order}" for name in _ORDERED for order in ORDERS), "head and loss", OTHER)
_RULES = [
    (f"{name}, {order}", re.compile(pattern)) for name, patterns in _ORDERED.items() for order, pattern in patterns
] + [("head and loss", re.compile(_HEAD))]


def stage_of(names: Iterable[str]) -> str:
    """The stage of an operation: that of the first of its names to have one.

    names: of the operation and those it runs within, the outermost first: within a backward node a convolution is part
        of that node's order
    """
    for name in names:
        # torch's engine opens a range of its own around each node.
        name = name.rpartition(": ")[2]
        for stage, pattern in _RULES:
            if pattern.fullmatch(name):
                return stage
    return OTHER


def is_operation(names: Sequence[str]) -> bool:
    """Whether a range of the profiler is an op: not a node of the graph, nor the engine's own work.

    names: as `stage_of`'s. The autograd Function within an op of ours is part of it: the kernel runs there.
    """
    *within, name = names
    return ("::" in name and not name.startswith("autograd::")) or (bool(within) and within[-1].startswith("kfo_ext::"))
