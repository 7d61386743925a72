"""A trial forward without side effects: buffers, attributes, their contents and random states are restored."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calls import BufferReplay

# Immutable values, compared by ==.
PLAIN = (bool, int, float, str, type(None))


@contextmanager
def undone(module: nn.Module, arguments: Any) -> Iterator[Callable[[], str]]:
    """Restore everything that the block changes in a module.

    It covers attributes, and the containers, objects and NumPy arrays that they hold, at any depth. The caller's hooks
    on saved tensors do not see the block: a checkpoint would miss its tensors when it recomputes.

    Args:
        module: the module, with its submodules.
        arguments: the tensors it is called with; their devices' random states are restored, too.

    Yields:
        A function that describes the first change that would affect a later forward, or returns "".
    """
    cuda = {X.device for X in tree_leaves(arguments) if isinstance(X, Tensor) and X.is_cuda}
    with BufferReplay(module), torch.random.fork_rng(devices=cuda, device_type="cuda"), _unseen():
        own = [(each, dict(vars(each))) for each in module.modules()]
        held: dict[int, tuple[str, Any, Any]] = {}
        for each, attributes in own:
            for name, value in attributes.items():
                # `call_with` is substituting the parameters.
                if name not in ("_parameters", "_modules"):
                    _hold(f"{type(each).__name__}.{name}", value, held)
        draws = _python_draws()

        def changed() -> str:
            for each, attributes in own:
                for name, value in vars(each).items():
                    if not _same(value, attributes.get(name, own)):
                        return f"sets {type(each).__name__}.{name}"
            for name, value, before in held.values():
                if not _same_items(_contents(value), before):
                    return f"sets {name}"
            # One draw would serve all tasks.
            return next((f"draws numbers by {name}" for name, get, _, state in draws if _differ(get(), state)), "")

        try:
            yield changed
        finally:
            for each, attributes in own:
                _refill(vars(each), attributes)
            for _, value, before in held.values():
                # An array may be read-only.
                if not _same_items(_contents(value), before):
                    _refill(_contents(value), before)
            for _, _, put, state in draws:
                put(state)


def _unseen() -> AbstractContextManager:
    """Hides the block's saved tensors from the caller's hooks."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        # Without need there are none, as torch.func.grad refuses any.
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_saved, lambda X: X)


def _saved(X: Tensor) -> Tensor:
    """What a graph keeps of a tensor: the tensor itself, if an output, would keep the graph alive."""
    with torch._C.DisableTorchFunction():
        return X.detach()


# The name, getter, setter and present value of a random state.
_State = tuple[str, Callable[[], Any], Callable[[Any], Any], Any]


def _python_draws() -> list[_State]:
    """The random states outside torch."""
    found: list[_State] = [("random", random.getstate, random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy.random"):
        found.append(("numpy.random", numpy.get_state, numpy.set_state, numpy.get_state()))
    return found


def _differ(one: Any, other: Any) -> bool:
    return pickle.dumps(one) != pickle.dumps(other)


def _hold(name: str, value: Any, held: dict[int, tuple[str, Any, Any]]) -> None:
    """Record what a value holds, recursively."""
    contents = _contents(value)
    if (contents is None and not isinstance(value, tuple)) or id(value) in held:
        return
    if contents is not None:
        held[id(value)] = name, value, copy.copy(contents)
    if not _is_array(value):
        inner = value if isinstance(value, tuple) else contents
        for each in list(inner.values() if isinstance(inner, dict) else inner):
            _hold(name, each, held)


def _contents(value: Any) -> Any:
    if isinstance(value, (list, dict, set, deque)) or _is_array(value):
        return value
    if isinstance(value, (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType)):
        return None
    return getattr(value, "__dict__", None)


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) in PLAIN and type(one) is type(other) and one == other)


def _same_items(one: Any, other: Any) -> bool:
    if _is_array(one):
        return one.shape == other.shape and one.tobytes() == other.tobytes()
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(name in other and _same(value, other[name]) for name, value in one.items())
    return one == other if isinstance(one, set) else all(map(_same, one, other))


def _refill(value: Any, contents: Any) -> None:
    if _is_array(value):
        value[...] = contents
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(contents)
