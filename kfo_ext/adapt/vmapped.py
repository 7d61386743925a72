"""One forward of all tasks for any network of verified functions: torch.func.vmap over the module's own forward.

Convolutions and batch norms run on our operators (`kfo_ext.ops.per_task`). A forward of one task makes a plan: whether
vmap serves the network, which batch norms have a ReLU to fuse, which convolutions need no bias because batch norm
subtracts it again, and how large the activations are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from kfo_ext.ops import per_task
from kfo_ext.ops.functions import KINDS, single, tensors_in
from kfo_ext.ops.torch_private import add_batch_dim, enter_vmap, leave_vmap, load_decompositions, remove_batch_dim

from .composed import COMPOSED
from .undone import PLAIN, undone
from .verified import DESCRIBING, IN_PLACE, SHARING, is_mapped, refusal

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class Unserved(BaseException):
    """The forward calls something that vmap does not compute right. `except Exception` in a model does not catch it."""


class Plan(NamedTuple):
    """What a forward of one task has found.

    Attributes:
        reason: why the network runs task by task, or "" if vmap serves it.
        fused: indices, in call order, of the batch norms whose only consumer is a ReLU.
        unbiased: indices of the convolutions whose only consumer is a batch norm.
        largest: bytes of the largest activation of a task.
        norms: the batch norms of the network; None if they were not looked for.
    """

    reason: str
    fused: frozenset[int] = frozenset()
    unbiased: frozenset[int] = frozenset()
    largest: int = 0
    norms: tuple[nn.Module, ...] | None = None


def mapped(module: nn.Module, function: Callable, plan: Plan) -> Callable:
    """`function`, which calls `module`, for all tasks: arguments and results have a leading task dimension."""

    def run(*arguments: Any) -> Any:
        forward = _Forward(plan, module)
        results = _through_vmap(forward, function, arguments)
        # In a loop's order: all calls of the first task, then those of the second.
        forward.statistics.follow()
        return results

    return run


def make_plan(module: nn.Module, function: Callable, *arguments: Any) -> Plan:
    """Make the plan of a function that calls a module.

    An error that the function raises even without vmap is raised.

    Args:
        module: the module that `function` calls.
        function: the function to map over tasks.
        *arguments: its arguments for one task, (1, ...) each.

    Returns:
        The plan; its `reason` is not empty if vmap does not serve the function.
    """
    if any(getattr(_modules, hooks) for hooks in _GLOBAL_HOOKS):
        return Plan("there are hooks of all modules")
    for name, each in module.named_modules():
        if _has_hooks(each):
            return Plan(f"{type(each).__name__}{f' {name!r}' if name else ''} has a hook")
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        return Plan("torch.jit does not report the functions that it calls")
    try:
        with torch.enable_grad(), undone(module, arguments) as changed:
            recorder = _Forward(None, module)
            _through_vmap(recorder, function, arguments)
            if change := changed():
                return Plan(f"its forward {change}")
    except Unserved as reason:
        return Plan(str(reason))
    except Exception as error:
        with torch.enable_grad(), undone(module, arguments):
            # Copies: a forward may change its arguments.
            function(*(tree_map(lambda X: X[0].clone(), argument) for argument in arguments))
        return Plan(f"torch.func.vmap: {(str(error).splitlines() or [type(error).__name__])[0]}")
    return recorder.plan_made()


def _through_vmap(forward: _Forward, function: Callable, arguments: tuple) -> Any:
    forward.tasks = len(tree_leaves(arguments)[0])

    load_decompositions()
    # As torch.func.vmap, without its handling of nested arguments, which is slow.
    level = enter_vmap(forward.tasks, "different")
    try:
        inputs = [_each(lambda X: add_batch_dim(X, 0, level), argument) for argument in arguments]
        with forward:
            forward.begin(inputs)
            result = function(*inputs)
            forward.finish(result)
        return _each(lambda Y: remove_batch_dim(Y, level, forward.tasks, 0), result)
    finally:
        leave_vmap()


def _each(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """tree_map, fast for a tensor or a list of tensors."""
    if isinstance(values, Tensor):
        return function(values)
    if type(values) is list and all(isinstance(X, Tensor) for X in values):
        return [function(X) for X in values]
    return tree_map(function, values)


def signature(module: nn.Module) -> tuple:
    """The key of a plan, besides the shapes of its arguments: the modules and their settings."""
    everywhere = any(getattr(_modules, hooks) for hooks in _GLOBAL_HOOKS)
    # The modules themselves: the id of a deleted one may be reused.
    return everywhere, *(
        (each, type(each).forward, _has_hooks(each), *(item for item in vars(each).items() if type(item[1]) in PLAIN))
        for each in module.modules()
    )


class _Output(NamedTuple):
    """The output of a function whose consumer may be fused with it.

    Attributes:
        shown: what the forward receives: X itself while planning; afterwards NaN, so that an unseen read shows.
        X: the output.
        maker: the kind of function that made it, and the index of the call.
        taker: the one kind of function that may consume it, once.
        left_out: the bias of a convolution that X lacks.
    """

    shown: Tensor
    X: Tensor
    maker: tuple[str, int]
    taker: str
    left_out: Tensor | None


class _Forward(TorchFunctionMode):
    """Intercepts every function of torch in a forward: replaces some by ours, passes verified ones, refuses others.

    Args:
        plan: what to fuse; None records what could be fused, and does not update running statistics.
        module: the module whose forward runs.
    """

    def __init__(self, plan: Plan | None, module: nn.Module) -> None:
        super().__init__()
        self.plan = plan
        self.norms = plan.norms if plan is not None else None
        if self.norms is None:
            self.norms = tuple(each for each in module.modules() if isinstance(each, nn.modules.batchnorm._NormBase))
        # The running statistics and counters of batch norms: nothing else may read them, as all tasks update them.
        self.counters = [norm.num_batches_tracked for norm in self.norms if norm.num_batches_tracked is not None]
        self.followed = {
            id(X): X for norm in self.norms for X in (norm.running_mean, norm.running_var) if X is not None
        }
        self.statistics = per_task.Statistics()
        self.channels_last = False
        self.tasks = 0
        self.counts = {"convolution": 0, "norm": 0}
        # By the id of what is shown.
        self.outputs: dict[int, _Output] = {}
        self.uses: dict[tuple[str, int], list[str]] = {}
        self.nans: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.largest = 0
        # While planning: tensors whose memory a change in place would reach in a loop but not here, or the reverse.
        self.fixed: dict[int, Tensor] = {}
        self.depth: int | None = None
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def begin(self, arguments: Sequence[Any]) -> None:
        """Record the state at the start of the forward."""
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
        if func in IN_PLACE and any(args[0] is counter for counter in self.counters):
            return args[0] if self.plan is None else func(args[0], args[1] * self.tasks)
        kind = KINDS.get(func, "other")
        if self.outputs or self.followed:
            for X in tensors_in((args, tuple(kwargs.values()))):
                if id(X) in self.followed and kind != "norm":
                    raise Unserved(f"{_name(func)} reads running statistics")
                if id(X) in self.outputs:
                    self._take(self.outputs[id(X)], kind)
        if kind == "relu" and self.plan is not None and id(args[0]) in self.outputs:
            return self.outputs[id(args[0])].X
        if kind == "convolution":
            return self._conv2d(func, *args, **kwargs)
        if kind == "norm":
            return self._batch_norm(*args, **kwargs)
        if func in _FORMATS and kwargs.get("memory_format") is torch.channels_last:
            # For torch's convolutions; ours are channels last anyway.
            self.channels_last = True
            kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
        if func in _VALUES:
            raise Unserved(f"its forward reads the values of a tensor ({func.__name__})")
        if reason := refusal(func, args, kwargs):
            raise Unserved(f"{_name(func)} {reason}")
        if (func in IN_PLACE or kwargs.get("inplace")) and _memory(args[0]) in self.fixed:
            raise Unserved(f"{_name(func)} changes an argument, or a tensor that was reshaped")
        result = COMPOSED.get(func, func)(*args, **kwargs)
        if func in SHARING:
            self._fix((args[0], result))
        return self._measured(result)

    def finish(self, result: Any) -> None:
        """Raises Unserved for a result that vmap cannot return, or for a fused function that was not called."""
        leaves = tree_leaves(result)
        if not all(isinstance(X, Tensor) for X in leaves):
            raise Unserved("its output is not of tensors alone")
        for X in leaves:
            if id(X) in self.outputs:
                self._take(self.outputs[id(X)], "result")
        if self.plan is not None and not all(self.uses[output.maker] for output in self.outputs.values()):
            raise Unserved(_CHANGES)

    def plan_made(self) -> Plan:
        """The plan of what a later forward may fuse."""
        fused, unbiased = (
            frozenset(number for (kind, number), uses in self.uses.items() if kind == made and uses == [taker])
            for made, taker in (("norm", "relu"), ("convolution", "norm"))
        )
        return Plan("", fused, unbiased, self.largest, self.norms)

    def _take(self, output: _Output, kind: str) -> None:
        """Record that a function of this kind consumes an output; raises Unserved if it is not the planned one."""
        self.uses[output.maker].append(kind)
        if self.plan is not None and self.uses[output.maker] != [output.taker]:
            raise Unserved(_CHANGES)

    def _made(self, X: Tensor, kind: str, taker: str, left_out: Tensor | None = None) -> Tensor:
        """The tensor that the forward receives for an output whose consumer may be fused."""
        maker = kind, self.counts[kind]
        shown = X if self.plan is None else self._nan(X.dtype, X.device).expand(X.shape)
        self.outputs[id(shown)] = _Output(shown, X, maker, taker, left_out)
        self.uses[maker] = []
        return shown

    def _nan(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (dtype, device) not in self.nans:
            self.nans[dtype, device] = torch.full((), torch.nan, dtype=dtype, device=device)
        return self.nans[dtype, device]

    def _measured(self, result: Any) -> Any:
        if self.plan is None:
            self.largest = max(self.largest, *(X.numel() * X.element_size() for X in tensors_in((result,))), 0)
        return result

    def _conv2d(self, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        stride, padding, dilation = map(single, (stride, padding, dilation))
        plain = isinstance(stride, int) and isinstance(padding, int) and dilation == groups == 1
        if not plain or input.dim() != 4 or not is_mapped(input):
            return self._measured(COMPOSED[func](input, weight, bias, stride, padding, dilation, groups))
        unbiased = self.plan is not None and self.counts["convolution"] in self.plan.unbiased
        y = per_task.conv2d(input, weight, stride, padding, self.channels_last)
        if bias is not None and not unbiased:
            y = y + bias.to(y.dtype).view(-1, 1, 1)
        self._measured(y)
        if self.plan is None or unbiased:
            y = self._made(y, "convolution", "norm", bias if unbiased else None)
        self.counts["convolution"] += 1
        return y

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if not training:
            raise Unserved("batch norm with running statistics")
        left_out = None
        if id(input) in self.outputs:
            _, input, _, _, left_out = self.outputs[id(input)]
        if not is_mapped(input):
            raise Unserved("batch norm of a tensor that all tasks share")
        fused = self.plan is not None and self.counts["norm"] in self.plan.fused
        weight = input.new_ones(input.shape[1]) if weight is None else weight
        bias = input.new_zeros(input.shape[1]) if bias is None else bias
        follows = self.plan is not None and running_mean is not None
        running = per_task.Running(self.statistics, running_mean, running_var, momentum) if follows else None
        y = self._measured(per_task.batch_norm(input, weight, bias, eps, fused, running, left_out))
        if self.plan is None or fused:
            y = self._made(y, "norm", "relu")
        self.counts["norm"] += 1
        return y


_FORMATS = (Tensor.contiguous, Tensor.to)
_CHANGES = "its forward is not the same in each call"


_VALUES = (Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist)


def _name(func: Callable) -> str:
    return resolve_name(func) or getattr(func, "__qualname__", repr(func))


def _memory(X: Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(X):
        X = torch._C._functorch.get_unwrapped(X)
    return X.untyped_storage().data_ptr() if X.numel() else 0


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
