"""The stage of a meta-iteration that an operation belongs to, by its name in torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OTHER = "other torch operations"
# The ops of each stage, and its nodes of the graph without the final number of torch's own. Our convolutions are closed
# under differentiation: the gradients of conv2d are ops with nodes in turn.
NAMES = {
    "convolution, forward": "aten::conv2d aten::convolution aten::_convolution kfo_ext::conv2d kfo_ext::grouped_conv2d",
    "convolution, backward": "ConvolutionBackward aten::convolution_backward "
    "Conv2dBackward kfo_ext::conv2d_input kfo_ext::conv2d_weight "
    "kfo_ext::grouped_conv2d_input kfo_ext::grouped_conv2d_weight",
    "convolution, double backward": "ConvolutionBackwardBackward aten::_convolution_double_backward "
    "Conv2dInputBackward Conv2dWeightBackward",
    "batch norm + ReLU, forward": "aten::batch_norm aten::native_batch_norm aten::cudnn_batch_norm "
    "aten::relu aten::relu_ kfo_ext::batch_norm_relu",
    "batch norm + ReLU, backward": "NativeBatchNormBackward CudnnBatchNormBackward MiopenBatchNormBackward "
    "aten::native_batch_norm_backward aten::cudnn_batch_norm_backward "
    "ReluBackward ThresholdBackward aten::threshold_backward kfo_ext::batch_norm_relu_backward",
    "batch norm + ReLU, double backward": "NativeBatchNormBackwardBackward CudnnBatchNormBackwardBackward "
    "MiopenBatchNormBackwardBackward ThresholdBackwardBackward kfo_ext::batch_norm_relu_double_backward",
    "transform, forward": "kfo_ext::transform kfo_ext::transform_triton",
    "transform, backward": "kfo_ext::transform_backward kfo_ext::transform_backward_triton",
    "transform, double backward": "kfo_ext::transform_double_backward kfo_ext::transform_double_backward_triton",
    "head and loss": "aten::linear aten::addmm aten::baddbmm aten::mean aten::cross_entropy_loss aten::log_softmax "
    "aten::nll_loss aten::nll_loss_nd AddmmBackward MmBackward BaddbmmBackward BmmBackward MeanBackward "
    "LogSoftmaxBackward NllLossBackward LogSoftmaxBackwardDataBackward NllLossBackwardBackward",
}
STAGES = (*NAMES, OTHER)
_STAGE = {name: stage for stage, names in NAMES.items() for name in names.split()}


def stage_of(names: Iterable[str]) -> str:
    """Return the stage of an operation: that of the first name that has one.

    Args:
        names: the names of the operation and of those it runs within, the outermost first: within a backward node a
            convolution is part of that node's order.

    Returns:
        One of `STAGES`.
    """
    for name in names:
        # torch's engine opens another range around each node.
        name = name.rpartition(": ")[2]
        stage = _STAGE.get(name if "::" in name else name.rstrip("0123456789"))
        if stage:
            return stage
    return OTHER


def is_operation(names: Sequence[str]) -> bool:
    """Return whether a range of the profiler is an op, rather than a node of the graph or the engine's work.

    Args:
        names: as for `stage_of`.

    Returns:
        True also for the autograd Function within one of our ops, since the kernel runs there.
    """
    *within, name = names
    return ("::" in name and not name.startswith("autograd::")) or (bool(within) and within[-1].startswith("kfo_ext::"))
