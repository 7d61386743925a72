"""Calls of a module with substituted parameters: one thread at a time, since modules and buffers may be shared."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# A call substitutes the module's parameters in place, and sdpa_kernel sets flags of the whole process.
_ONE_THREAD = threading.RLock()


@contextmanager
def exclusive(differentiable: bool = False) -> Iterator[None]:
    """Keep other threads from calling a module with substituted parameters.

    Args:
        differentiable: use the form of torch's attention that has a second derivative, which the fused kernels lack.

    Yields:
        Nothing; the lock is held in the block.
    """
    with _ONE_THREAD, sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
        yield


# A place that holds a parameter: a module, and the parameter's name there.
Slot = tuple[nn.Module, str]


def slots(module: nn.Module, parameters: Sequence[Tensor]) -> list[list[Slot]]:
    """Find every place in a module that holds each of the given parameters.

    Args:
        module: the module to search, with all its submodules.
        parameters: some of its parameters.

    Returns:
        For each parameter the places that hold it; more than one if it is tied.

    Raises:
        TypeError: the module's parameters cannot be substituted, since it runs outside Python or on copies.
    """
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)):
        raise TypeError(f"model: expected a module of Python, got {type(module).__name__}: pass the one it was made of")
    held: dict[int, list[Slot]] = {id(parameter): [] for parameter in parameters}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if id(parameter) in held:
                held[id(parameter)].append((owner, name))
    return [held[id(parameter)] for parameter in parameters]


def call_with(module: nn.Module, places: Sequence[Sequence[Slot]], tensors: Sequence[Tensor], x: Tensor) -> Any:
    """Return module(x) with tensors substituted for its parameters, which are restored afterwards.

    Equals torch.func.functional_call with all ties, in a fifth of the time.

    Args:
        module: the module to call.
        places: the places of each parameter, as `slots` returns them.
        tensors: what to substitute, in the order of `places`.
        x: the module's argument.

    Returns:
        The module's output.
    """
    own = [(owner, name, owner._parameters[name]) for held in places for owner, name in held]
    try:
        for held, tensor in zip(places, tensors):
            for owner, name in held:
                # nn.Module's own assignment accepts only a Parameter.
                owner._parameters[name] = tensor  # type: ignore[assignment]
        return module(x)
    finally:
        for owner, name, parameter in own:
            owner._parameters[name] = parameter


class BufferReplay:
    """A context for recomputation: restores the buffers of the first computation, and the present ones on exit.

    It can be entered more than once: by a gradient inside the first computation, then by each outer one.

    Args:
        module: the module whose buffers are saved now.
    """

    def __init__(self, module: nn.Module) -> None:
        # All buffers: torch's batch norm changes its own without counting up their version.
        self.taken = [
            (owner, name, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def __enter__(self) -> None:
        _ONE_THREAD.acquire()
        self.present = [(owner, name, owner._buffers[name]) for owner, name, _ in self.taken]
        for owner, name, value in self.taken:
            # A new tensor, not a new value in the present one, which a graph may have saved.
            owner._buffers[name] = value.clone()

    def __exit__(self, *exc: object) -> None:
        for owner, name, buffer in self.present:
            owner._buffers[name] = buffer
        _ONE_THREAD.release()
