"""Calls of a module with other parameters than its own: one thread at a time, shared modules and buffers included."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# functional_call swaps a module's tensors in place, and sdpa_kernel sets flags of the whole process.
_ONE_THREAD = threading.RLock()


@contextmanager
def exclusive(differentiable: bool = False) -> Iterator[None]:
    """Let no other thread call a module with other parameters meanwhile.

    differentiable: use the form of torch's attention that has a second derivative, which the fused kernels lack.
    """
    with _ONE_THREAD, sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext():
        yield


def slots(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Every name under which a module object holds the parameter, for each named parameter of `module`.

    A module object that has several names is entered by its first: functional_call would save the tensor that it has
    just swapped in as the one to restore.
    """
    held: dict[int, list[str]] = {}
    for prefix, owner in module.named_modules():
        for slot, parameter in owner._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), []).append(f"{prefix}.{slot}" if prefix else slot)
    parameters = dict(module.named_parameters())
    return [held[id(parameters[name])] for name in names]


def embedding_slots(module: nn.Module, chosen: Callable[[nn.Embedding | nn.EmbeddingBag], bool]) -> set[str]:
    """The names of the weights of the embeddings that are chosen."""
    return {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, owner in module.named_modules()
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and chosen(owner)
    }


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
