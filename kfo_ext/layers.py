"""`fast_layers`: conv2d and batch norm + ReLU on our operators, in code that calls torch's functions.

Our operators return tensors in channels-last memory, which the next layer reads without a copy. torch's would be
contiguous, so a tensor is made contiguous before any function that could tell the difference reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfo_ext.adapt.verified import DESCRIBING
from kfo_ext.ops import one_task
from kfo_ext.ops.functions import KINDS, single
from kfo_ext.ops.operands import ready
from kfo_ext.ops.own_code import LayerMode
from kfo_ext.ops.torch_private import dispatch_modes, jit_trace, saved_tensor_hooks, transformed

# Functions that return a new tensor, or their first argument, in the memory format of their operands.
_ANY_FORMAT: frozenset[Callable] = frozenset(
    [
        *KINDS,
        *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d),
        *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    ]
)
# Some of torch's kernels truncate sizes to 32 bits, and torch itself raises for numbers of more than 64.
_MOST_PADDING, _MOST_STRIDE = (1 << 30) - 1, (1 << 63) - 1


@contextmanager
def fast_layers() -> Iterator[None]:
    """Run conv2d and batch norm + ReLU on our CPU kernels in the block, in all code of this thread that calls torch's.

    with kfo_ext.fast_layers():
        ...  # an unchanged loop: forward, torch.autograd.grad, backward

    It also decorates a function. Results equal torch's up to rounding, as do derivatives of every order, running
    statistics and in-place changes. Graphs may outlive the block: their backward passes do not depend on it.

    It replaces convolutions without groups or dilation, with the same stride and padding for both axes, and batch norms
    of images by batch statistics, in float32 and float64 on the CPU. Everything else runs in torch: other types,
    devices and arguments, subclasses of tensors, and all calls under torch.func, torch.compile, autocast, forward-mode
    AD, saved-tensor hooks such as checkpoint's, inference mode or a TorchDispatchMode.

    In the block, every function of torch receives tensors in the layout that torch would give them. After the block, a
    kept activation that a later layer has consumed may be channels last: use `reshape`, as `view` may raise. An
    nn.Parameter made from an activation within the block may not share its memory: torch does not report that call.

    Yields:
        Nothing; layers are replaced in the block.
    """
    with _FastLayers():
        yield


class _Output:
    """The state of a tensor that a layer returned.

    Args:
        X: the tensor; only a weak reference is kept.
        others: the table of states by id, from which this one is removed with the tensor.
        keeps: see the attribute.

    Attributes:
        keeps: whether the layout is final: torch's would be channels last too, or a function has seen the tensor.
        made: its version when it was made; None once a function may have changed its values by another way.
        taken: whether a layer has consumed it: it may then stay channels last when the block ends.
        seen: whether something may have hooked into its derivative, even if the tensor itself is gone.
    """

    def __init__(self, X: Tensor, others: dict[int, _Output], keeps: bool) -> None:
        key, self.keeps = id(X), keeps
        self.ref = weakref.ref(X, lambda _: others.pop(key, None))
        self.made: int | None = X._version
        self.taken = self.seen = False

    def unseen(self) -> bool:
        """Whether no function has seen the tensor, and it is gone."""
        return not self.seen and self.ref() is None

    def shown(self, X: Tensor) -> None:
        """Make X, the tensor, contiguous for a function that could tell its layout."""
        self.made, self.seen = None, True
        if not self.keeps and not X.is_contiguous():
            # The tensor keeps its history and version; no function has seen its memory yet.
            X.data = X.detach().contiguous()
        # Later changes are the caller's, and other tensors may share its memory.
        self.keeps = True


class _Convolution(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any


class _Norm(NamedTuple):
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: Any
    momentum: Any
    eps: Any


class _FastLayers(LayerMode):
    """Intercepts every function of torch, and replaces those that our operators implement."""

    def __init__(self) -> None:
        super().__init__()
        # By id. The states hold no tensor.
        self.outputs: dict[int, _Output] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A compiler traces nothing beyond this test.
        if torch.compiler.is_compiling() or not (self.outputs or func in KINDS):
            return func(*args, **kwargs)
        if func in DESCRIBING:
            return func(*args, **kwargs)
        if func not in _ANY_FORMAT or "out" in kwargs or not _possible():
            self._show(args)
            self._show(kwargs.values())
            return func(*args, **kwargs)
        y = _LAYERS[KINDS[func]](self, func, args, kwargs) if func in KINDS else None
        if y is None:
            y = func(*args, **kwargs)
        self._take(args, kwargs, y)
        return y

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for output in list(self.outputs.values()):
            if (X := output.ref()) is not None:
                output.seen = True
                if not output.taken:
                    output.shown(X)
        self.outputs.clear()

    def _show(self, values: Iterable[Any]) -> None:
        """Convert a function's arguments to the memory format that torch would have given them."""
        for X in values:
            if isinstance(X, (tuple, list)):
                self._show(X)
            elif (output := self.outputs.get(id(X))) is not None:
                output.shown(X)

    def _take(self, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        """Record the arguments that a function has consumed, and its result, which has their memory format."""
        # No function of `_ANY_FORMAT` takes a list of tensors.
        given = [X for X in (*args, *kwargs.values()) if isinstance(X, Tensor)]
        for X in given:
            if (output := self.outputs.get(id(X))) is not None:
                output.taken = True
        if id(y) in self.outputs:
            # Changed in place: the result has not been consumed.
            self.outputs[id(y)].taken = False
        elif type(y) is Tensor and y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
            # For operands that the caller made channels last, torch's result is channels last too.
            keeps = any(_lies_channels_last(X) and self._lies_as_torchs(X) for X in given)
            self.outputs[id(y)] = _Output(y, self.outputs, keeps)

    def _lies_as_torchs(self, X: Tensor) -> bool:
        return id(X) not in self.outputs or self.outputs[id(X)].keeps

    def _convolution(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        try:
            x, weight, bias, stride, padding = _convolution_of(*args, **kwargs)
        except TypeError:
            return None
        if not _usual((x, weight), bias) or x.dim() != 4 or weight.dim() != 4:
            return None
        if type(stride) is not int or type(padding) is not int:
            return None
        if not 1 <= stride <= _MOST_STRIDE or not 0 <= padding <= _MOST_PADDING:
            return None
        fits = all(0 < k <= n + 2 * padding for n, k in zip(x.shape[2:], weight.shape[2:]))
        if not fits or 0 in x.shape or weight.shape[0] == 0 or weight.shape[1] != x.shape[1]:
            return None
        if bias is not None and bias.shape != weight.shape[:1]:
            return None
        try:
            return one_task.conv2d(x, weight, bias, stride, padding)
        except torch.OutOfMemoryError:
            return None

    def _norm(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        try:
            x, mean, variance, weight, bias, training, momentum, eps = _norm_of(*args, **kwargs)
        except TypeError:
            return None
        if not _usual((x,), mean, variance, weight, bias) or x.dim() != 4 or training is not True:
            return None
        each = [X for X in (mean, variance, weight, bias) if X is not None]
        if 0 in x.shape or x.numel() == x.shape[1] or any(X.shape != x.shape[1:2] for X in each):
            return None
        if (mean is None) != (variance is None) or type(eps) is not float or not eps > 0:
            return None
        if any(X is not None and X.requires_grad for X in (mean, variance)) or type(momentum) is not float:
            return None
        try:
            z = one_task.batch_norm(x, weight, bias, eps)
        except torch.OutOfMemoryError:
            return None
        if mean is not None and variance is not None:
            one_task.follow(x, mean, variance, momentum)
        return z

    def _relu(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        z = args[0] if args else None
        output = self.outputs.get(id(z))
        if z is None or output is None or output.made != z._version or not torch.is_grad_enabled():
            return None
        in_place = func in _RELU_IN_PLACE or kwargs.get("inplace", args[1] if len(args) > 1 else False)
        if type(in_place) is not bool or len(args) > 2 or not kwargs.keys() <= {"inplace"}:
            return None
        y = one_task.norm_relu(z, in_place, _always if in_place else output.unseen)
        if y is not None and in_place:
            output.made = None
        return y


_LAYERS = {"convolution": _FastLayers._convolution, "norm": _FastLayers._norm, "relu": _FastLayers._relu}
# From 2.13 on torch has no named dimensions.
_has_names: Callable[[Tensor], bool] = getattr(Tensor, "has_names", lambda X: False)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_)


def _always() -> bool:
    return True


def _convolution_of(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> _Convolution:
    """The arguments of torch's conv2d; TypeError if they are not, or if our convolution does not support them."""
    if single(dilation) != 1 or groups != 1:
        raise TypeError
    return _Convolution(input, weight, bias, single(stride), single(padding))


def _norm_of(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> _Norm:
    """The arguments of torch's batch norm; TypeError if they are not."""
    return _Norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _possible() -> bool:
    """Whether no transform, mode or hook is active for which our layers have no rule."""
    return (
        one_task.AVAILABLE
        and not transformed()
        and not torch.is_inference_mode_enabled()
        and saved_tensor_hooks() is None
        and dispatch_modes() == 0
        and jit_trace() is None
    )


def _usual(needed: tuple[Tensor, ...], *optional: Tensor | None) -> bool:
    """Whether all are plain tensors on the CPU, of one dtype that our kernels support, outside autocast."""
    given = [*needed, *(X for X in optional if X is not None)]
    return (
        all(type(X) in (Tensor, nn.Parameter) for X in given)
        and ready(given)
        and given[0].device.type == "cpu"
        and not any(_has_names(X) or X.is_neg() or X.is_inference() for X in given)
    )


def _lies_channels_last(X: Tensor) -> bool:
    return X.dim() == 4 and not X.is_contiguous() and X.is_contiguous(memory_format=torch.channels_last)
