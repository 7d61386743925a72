"""Calls of a module with other parameters than its own: one thread at a time, shared modules and buffers included."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# A call with other parameters swaps the module's in place, and sdpa_kernel sets flags of the whole process.
_ONE_THREAD = threading.RLock()


@contextmanager
def exclusive(differentiable: bool = False) -> Iterator[None]:
    """Let no other thread call a module with other parameters meanwhile.

    differentiable: use the form of torch's attention that has a second derivative, which the fused kernels lack.
    """
    with _ONE_THREAD, sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
        yield


# A place that holds a parameter: a module, and the parameter's name there.
Slot = tuple[nn.Module, str]


def slots(module: nn.Module, parameters: Sequence[Tensor]) -> list[list[Slot]]:
    """Every place in `module` that holds the parameter, for each of some of its parameters.

    Raises:
        TypeError: a module whose parameters cannot be exchanged: it runs outside Python, or on copies.
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
    """module(x) with tensors in the place of its parameters; see `slots`. Afterwards it holds its own again.

    As torch.func.functional_call with all ties, in a fifth of the time.
    """
    own = [(owner, name, owner._parameters[name]) for held in places for owner, name in held]
    try:
        for held, tensor in zip(places, tensors):
            for owner, name in held:
                # nn.Module's own assignment takes nothing but a Parameter.
                owner._parameters[name] = tensor  # type: ignore[assignment]
        return module(x)
    finally:
        for owner, name, parameter in own:
            owner._parameters[name] = parameter


class BufferReplay:
    """Computes again with the buffers of the first time; afterwards the module has those that it had before.

    A context that can be entered more than once: by a gradient inside the first computation, then by each outer one.
    """

    def __init__(self, module: nn.Module) -> None:
        # All of them: torch's batch norm changes its own without a trace in their version.
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
            # Another tensor, not another value of the present one: a graph may have saved that.
            owner._buffers[name] = value.clone()

    def __exit__(self, *exc: object) -> None:
        for owner, name, buffer in self.present:
            owner._buffers[name] = buffer
        _ONE_THREAD.release()
