"""Which backend a layer runs on: the same rules for all of them."""

from __future__ import annotations

import torch

from kfo_ext.transform import native
from kfo_ext.transform.autograd import transformed
from kfo_ext.transform.op import why_not_native

BACKENDS = ("auto", "native", "reference")


def resolve(backend: str, device: torch.device, kernels: tuple[str, ...]) -> str:
    """What `backend` means on `device`: "auto" is native where its kernels are loaded, else reference.

    kernels: the types of device that the layer has kernels for

    Raises:
        ValueError: an unknown backend.
        RuntimeError: native, where its kernels are not loaded, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    there = device.type in kernels and native.available(device)
    if backend == "native" and not there:
        why = why_not_native(device.type) if device.type in kernels else f"it has kernels for {', '.join(kernels)}"
        raise RuntimeError(f"backend 'native' does not run on {device.type}: {why}")
    return "native" if there and backend != "reference" else "reference"


def runs_plain_torch(backend: str, device: torch.device, kernels: tuple[str, ...]) -> bool:
    """Whether a layer runs its reference: see `resolve`; and always under torch.func and forward-mode AD."""
    return resolve(backend, device, kernels) == "reference" or transformed()
