"""A forward run for its findings alone: buffers, attributes, what they contain and random states are set back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calls import BufferReplay

# Values that say all of themselves.
PLAIN = (bool, int, float, str, type(None))


@contextmanager
def undone(module: nn.Module, arguments: Any) -> Iterator[Callable[[], str]]:
    """Sets everything back that the block does to a module; yields what names an attribute that it has changed."""
    cuda = {X.device for X in tree_leaves(arguments) if isinstance(X, Tensor) and X.is_cuda}
    with BufferReplay(module), torch.random.fork_rng(devices=cuda, device_type="cuda"):
        own = [(each, dict(vars(each))) for each in module.modules()]
        held = [
            (f"{type(each).__name__}.{name}", value, copy.copy(_contents(value)))
            for each, attributes in own
            for name, value in attributes.items()
            # `call_with` is at work on the first.
            if name not in ("_parameters", "_modules") and _contents(value) is not None
        ]

        def changed() -> str:
            for each, attributes in own:
                for name, value in vars(each).items():
                    if not _same(value, attributes.get(name, own)):
                        return f"{type(each).__name__}.{name}"
            return next((name for name, value, before in held if not _same_items(_contents(value), before)), "")

        try:
            yield changed
        finally:
            for each, attributes in own:
                _refill(vars(each), attributes)
            for _, value, before in held:
                _refill(_contents(value), before)


def _contents(value: Any) -> Any:
    if isinstance(value, SimpleNamespace):
        return vars(value)
    return value if isinstance(value, (list, dict, set, deque)) else None


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) in PLAIN and type(one) is type(other) and one == other)


def _same_items(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(name in other and _same(value, other[name]) for name, value in one.items())
    return one == other if isinstance(one, set) else all(map(_same, one, other))


def _refill(value: Any, contents: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(contents)
