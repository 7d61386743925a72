"""One forward of all tasks for any network of verified functions: torch.func.vmap over the module's own forward.

Convolutions and batch norms run on our operators (`kfo_ext.functional.per_task`). A plan, made by a forward of one
task, says whether the network can be served, which batch norms have a ReLU to fuse, which convolutions need no bias,
since batch norm subtracts it again, and how large the activations are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.modules import module as _modules
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from kfo_ext.functional import per_task

from .composed import COMPOSED
from .verified import DESCRIBING, IN_PLACE, SHARING, refusal

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_KINDS = {
    **dict.fromkeys((F.conv2d, torch.conv2d), "convolution"),
    F.batch_norm: "norm",
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), "relu"),
}


class Unserved(BaseException):
    """The forward did what vmap does not do right. No `except Exception` of the user's takes it."""


class Plan(NamedTuple):
    """What a forward of one task has shown.

    reason: why the network goes task by task, or "" if it need not.
    fused: numbers, in order of their calls, of the batch norms whose only consumer is a ReLU.
    unbiased: numbers of the convolutions whose only consumer is a batch norm.
    largest: bytes of the largest activation of a task.
    """

    reason: str
    fused: frozenset[int] = frozenset()
    unbiased: frozenset[int] = frozenset()
    largest: int = 0


def mapped(module: nn.Module, function: Callable, plan: Plan | None, recorder: _Forward | None = None) -> Callable:
    """`function`, which calls `module`, for all tasks: arguments and results have a leading task dimension."""

    def run(*arguments: Any) -> Any:
        forward = recorder or _Forward(plan, _counters(module))
        forward.tasks = len(tree_leaves(arguments)[0])

        def one(*arguments: Any) -> Any:
            forward.begin(arguments)
            result = function(*arguments)
            forward.finish(result)
            return result

        with forward:
            return vmap(one, randomness="different")(*arguments)

    return run


def make_plan(module: nn.Module, function: Callable, *arguments: Any) -> Plan:
    """The plan of a function that calls `module`, from its arguments for one task, (1, ...) each.

    An error that the function raises without vmap too is raised.
    """
    if any(getattr(_modules, hooks) for hooks in _GLOBAL_HOOKS):
        return Plan("there are hooks of all modules")
    for name, each in module.named_modules():
        if _has_hooks(each):
            return Plan(f"{type(each).__name__}{f' {name!r}' if name else ''} has a hook")
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        return Plan("torch.jit does not report the functions that it calls")
    recorder = _Forward(None, _counters(module))
    try:
        with torch.no_grad(), _undone(module, arguments) as changed:
            mapped(module, function, None, recorder)(*arguments)
            if attribute := changed():
                raise Unserved(f"its forward sets {attribute}")
    except Unserved as reason:
        return Plan(str(reason))
    except Exception as error:
        with torch.no_grad(), _undone(module, arguments):
            function(*(tree_map(lambda X: X[0], argument) for argument in arguments))
        return Plan(f"torch.func.vmap: {(str(error).splitlines() or [type(error).__name__])[0]}")
    return recorder.plan_made()


def signature(module: nn.Module) -> tuple:
    """What a plan depends on, besides the shapes of its arguments: the modules and all that they are set to."""
    everywhere = any(getattr(_modules, hooks) for hooks in _GLOBAL_HOOKS)
    # The modules themselves: an identity alone may come again.
    return everywhere, *(
        (each, type(each).forward, _has_hooks(each), *(item for item in vars(each).items() if type(item[1]) in _PLAIN))
        for each in module.modules()
    )


_PLAIN = (bool, int, float, str, type(None))


class _Forward(TorchFunctionMode):
    """Sees every function of torch in a forward: replaces some by ours, lets the verified pass, stops at any other.

    plan: what may be left out; None records what could be, and leaves running statistics alone.
    counters: buffers in which batch norms count the tasks.
    """

    def __init__(self, plan: Plan | None, counters: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.plan = plan
        self.counters = counters
        self.channels_last = False
        self.tasks = 0
        self.counts = {"convolution": 0, "norm": 0}
        # Outputs by identity, what made them, and the one kind of function that may take them.
        self.outputs: dict[int, tuple[Tensor, tuple[str, int], str]] = {}
        # By the same identity, the bias that a convolution has left out.
        self.biases: dict[int, Tensor] = {}
        self.uses: dict[tuple[str, int], list[str]] = {}
        self.largest = 0
        # While planning: tensors whose memory a change in place would reach in a loop and not here, or the reverse.
        self.fixed: dict[int, Tensor] = {}
        self.depth = 0
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def begin(self, arguments: tuple) -> None:
        """Notes what the forward starts from."""
        self.depth = torch._C._functorch.maybe_current_level()
        with torch._C.DisableTorchFunction():
            self._fix(arguments)

    def _fix(self, values: Any) -> None:
        if self.plan is None:
            self.fixed.update((_memory(X), X) for X in tree_leaves(values) if isinstance(X, Tensor))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DESCRIBING:
            return func(*args, **kwargs)
        if torch._C._functorch.maybe_current_level() != self.depth:
            raise Unserved("its forward calls a transform of torch.func")
        if torch._C._autograd._top_saved_tensors_default_hooks(True) != self.hooks:
            raise Unserved("its forward saves tensors by hooks, as torch.utils.checkpoint does")
        kind = _KINDS.get(func, "other")
        if self.outputs:
            for X in _tensors((args, tuple(kwargs.values()))):
                if id(X) in self.outputs and self._taken(X, kind) == "relu":
                    return X
        if kind == "convolution":
            return self._conv2d(func, *args, **kwargs)
        if kind == "norm":
            return self._batch_norm(*args, **kwargs)
        if func in _FORMATS and kwargs.get("memory_format") is torch.channels_last:
            # Of torch's convolutions; ours is channels last anyway.
            self.channels_last = True
            kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
        if func in IN_PLACE and any(args[0] is counter for counter in self.counters):
            return args[0] if self.plan is None else func(args[0], args[1] * self.tasks)
        if reason := refusal(func, args, kwargs):
            raise Unserved(f"{_name(func)} {reason}")
        if (func in IN_PLACE or kwargs.get("inplace")) and _memory(args[0]) in self.fixed:
            raise Unserved(f"{_name(func)} changes an argument, or a tensor that was reshaped")
        result = COMPOSED.get(func, func)(*args, **kwargs)
        if func in SHARING:
            self._fix((args[0], result))
        return self._measured(result)

    def finish(self, result: Any) -> None:
        """Raises Unserved for a result that vmap cannot return, or if what was left out has not been made up for."""
        leaves = tree_leaves(result)
        if not all(isinstance(X, Tensor) for X in leaves):
            raise Unserved("its output is not of tensors alone")
        if self.plan is not None and self.outputs:
            raise Unserved(_CHANGES)
        for X in leaves:
            if id(X) in self.outputs:
                self.uses[self.outputs[id(X)][1]].append("result")

    def plan_made(self) -> Plan:
        """What a later forward may leave out."""
        fused, unbiased = (
            frozenset(number for (kind, number), uses in self.uses.items() if kind == made and uses == [taker])
            for made, taker in (("norm", "relu"), ("convolution", "norm"))
        )
        return Plan("", fused, unbiased, self.largest)

    def _taken(self, X: Tensor, kind: str) -> str | None:
        """Notes that a function of this kind takes X; in a planned forward the kind that X has been made for."""
        _, maker, taker = self.outputs[id(X)]
        if self.plan is None:
            self.uses[maker].append(kind)
            return None
        if kind != taker:
            raise Unserved(_CHANGES)
        # From here on it stands for that function's result.
        del self.outputs[id(X)]
        return taker

    def _made(self, X: Tensor, kind: str, taker: str) -> Tensor:
        """Notes an output for whose consumer something has been, or could be, left out."""
        self.outputs[id(X)] = X, (kind, self.counts[kind]), taker
        self.uses[kind, self.counts[kind]] = []
        return X

    def _measured(self, result: Any) -> Any:
        if self.plan is None:
            self.largest = max(self.largest, *(X.numel() * X.element_size() for X in _tensors((result,))), 0)
        return result

    def _conv2d(self, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        stride, padding, dilation = map(_single, (stride, padding, dilation))
        plain = isinstance(stride, int) and isinstance(padding, int) and dilation == groups == 1
        if not plain or input.dim() != 4 or not _mapped(input):
            return self._measured(COMPOSED[func](input, weight, bias, stride, padding, dilation, groups))
        unbiased = self.plan is not None and self.counts["convolution"] in self.plan.unbiased
        y = per_task.conv2d(input, weight, stride, padding, self.channels_last)
        if bias is not None and unbiased:
            self.biases[id(y)] = bias
        elif bias is not None:
            y = y + bias.to(y.dtype).view(-1, 1, 1)
        if self.plan is None or unbiased:
            self._made(y, "convolution", "norm")
        self.counts["convolution"] += 1
        return self._measured(y)

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if not training:
            raise Unserved("batch norm with running statistics")
        if not _mapped(input):
            raise Unserved("batch norm of a tensor that all tasks share")
        fused = self.plan is not None and self.counts["norm"] in self.plan.fused
        weight = input.new_ones(input.shape[1]) if weight is None else weight
        bias = input.new_zeros(input.shape[1]) if bias is None else bias
        left_out = self.biases.pop(id(input), None)
        if left_out is not None:
            # It has no effect on the output, and so a gradient of zeros.
            bias = bias + 0 * left_out
        follows = self.plan is not None and running_mean is not None
        running = per_task.Running(running_mean, running_var, momentum) if follows else None
        y = per_task.batch_norm(input, weight, bias, eps, fused, running, left_out)
        if self.plan is None or fused:
            self._made(y, "norm", "relu")
        self.counts["norm"] += 1
        return self._measured(y)


_FORMATS = (Tensor.contiguous, Tensor.to)
_CHANGES = "its forward is not the same in each call"


def _name(func: Callable) -> str:
    return resolve_name(func) or getattr(func, "__qualname__", repr(func))


def _single(value: Any) -> Any:
    """The number that both axes have in common, or else the value itself."""
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and len(set(value)) == 1:
        return value[0]
    return value


def _memory(X: Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(X):
        X = torch._C._functorch.get_unwrapped(X)
    return X.untyped_storage().data_ptr() if X.numel() else 0


def _mapped(X: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(X)


def _tensors(values: tuple) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _counters(module: nn.Module) -> list[Tensor]:
    norms = (each for each in module.modules() if isinstance(each, nn.modules.batchnorm._NormBase))
    return [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@contextmanager
def _undone(module: nn.Module, arguments: tuple) -> Iterator[Callable[[], str]]:
    """Sets back buffers, attributes and random states; yields what names an attribute or buffer that was changed."""
    before = [(each, dict(vars(each)), dict(each._buffers)) for each in module.modules()]
    sizes = {id(value): len(value) for _, own, _ in before for value in own.values() if isinstance(value, (list, set))}

    def changed() -> str:
        for each, own, buffers in before:
            for name, value in vars(each).items():
                if own.get(name) is not value or sizes.get(id(value), 0) != (len(value) if id(value) in sizes else 0):
                    return f"{type(each).__name__}.{name}"
            for name, buffer in each._buffers.items():
                if buffers.get(name) is not buffer:
                    return f"the buffer {name!r}"
        return ""

    cuda = {X.device for X in tree_leaves(arguments) if isinstance(X, Tensor) and X.is_cuda}
    with torch.random.fork_rng(devices=cuda, device_type="cuda"):
        try:
            yield changed
        finally:
            for each, own, buffers in before:
                vars(each).clear()
                vars(each).update(own)
                each._buffers.clear()
                each._buffers.update(buffers)
