"""Dispatch of a call to an implementation and a dtype: one rule for all operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfo_ext.ops import library, triton_support
from kfo_ext.ops.operands import check_tensors, in_one_dtype, ready
from kfo_ext.ops.torch_private import without_rules

BACKENDS = ("auto", "native", "triton", "reference")


class Operator:
    """The implementations of one operator.

    Args:
        operands: the operands' names, in the order of `run`'s; the first determines dtype and device.
        families: the registered overloads by backend: native, triton, grouped; None if they could not be loaded.
        devices: the types of device with compiled kernels.
        by_name: those of them where only backend="native" takes the compiled kernels, and "auto" does not.
    """

    def __init__(
        self,
        operands: tuple[str, ...],
        families: Mapping[str, Any],
        devices: tuple[str, ...],
        by_name: tuple[str, ...] = (),
    ) -> None:
        self.operands = operands
        self.families = families
        self.devices = devices
        self.by_name = by_name
        self.backends = ("auto", *families, "reference")

    def resolve(self, backend: str, device: torch.device) -> str:
        """Return the implementation of a backend on a device.

        "auto" means native if its kernels are loaded and not in `by_name`; else, on CUDA, triton if the operator
        has it and it is installed; else grouped if the operator has it, which runs anywhere; else reference. On CUDA,
        the last step warns for an operator with Triton kernels, with both reasons; on the CPU, importing kfo_ext has
        warned. On the CPU it never means triton, whose interpreter is for tests. A CUDA library that is loaded but does
        not run there is reported once for each device.

        Args:
            backend: "auto", "native", "triton", "grouped" or "reference".
            device: the operands' device.

        Returns:
            "native", "triton", "grouped" or "reference".

        Raises:
            ValueError: the backend is unknown.
            RuntimeError: a named backend does not run here; the message gives the reason.
        """
        if backend not in self.backends:
            raise ValueError(f"backend: expected one of {', '.join(self.backends)}, got {backend!r}")
        kind = device.type
        native = kind in self.devices and library.available(device, kind)
        if backend == "auto":
            if native and kind not in self.by_name:
                return "native"
            if kind == "cuda" and kind in self.devices and not native:
                has_triton = "triton" in self.families
                runs_triton = has_triton and triton_support.available(device)
                if has_triton and not runs_triton:
                    _warn_plain_torch(device)
                elif library.loaded("cuda"):
                    _say_once(device)
                if runs_triton:
                    return "triton"
            return "grouped" if "grouped" in self.families else "reference"
        if backend == "native" and not native:
            raise RuntimeError(f"backend 'native' does not run on {kind}: {self._why_not_native(device)}")
        if backend == "triton" and not triton_support.available(device):
            raise RuntimeError(f"backend 'triton' does not run on {kind}: {triton_support.reason(kind)}")
        return backend

    def _why_not_native(self, device: torch.device) -> str:
        if device.type in library.status() and device.type not in self.devices:
            return f"it has kernels for {', '.join(self.devices)}"
        return library.why_not(device)

    def check(self, given: tuple[Tensor, ...]) -> bool:
        """Check operands.

        Args:
            given: the operands, in order.

        Returns:
            Whether `run` may compute without conversions; see `kfo_ext.ops.operands.ready`.

        Raises:
            TypeError: an operand is no dense floating-point tensor.
            ValueError: operands are on several devices.
        """
        usual = ready(given)
        if not usual:
            check_tensors(dict(zip(self.operands, given)))
        return usual

    def run(self, compute: Callable[..., Tensor], given: tuple[Tensor, ...], backend: str, usual: bool) -> Tensor:
        """Compute a call on the implementation of a backend.

        Under transforms for which operators have no rules it runs plain torch; see `without_rules`.

        Args:
            compute: maps (family, *given) to the result; family None means plain torch.
            given: the operands, in order.
            backend: as for `resolve`.
            usual: the result of `check`.

        Returns:
            The result of `compute`.
        """
        name = self.resolve(backend, given[0].device)
        family = None if name == "reference" or without_rules() else self.families[name]
        if usual:
            return compute(family, *given)
        return in_one_dtype(partial(compute, family), dict(zip(self.operands, given)))


# Devices for which `_say_once` has warned.
_said: set[torch.device] = set()


def _say_once(device: torch.device) -> None:
    # A compiled graph is traced once and cannot warn.
    if torch.compiler.is_compiling() or device in _said:
        return
    _said.add(device)
    warnings.warn(
        f"kfo_ext: the compiled kernels do not run on {device}: {library.why_not(device)}; "
        "backend='auto' runs Triton's where an operator has them, else torch's",
        RuntimeWarning,
        stacklevel=5,
    )


def _warn_plain_torch(device: torch.device) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"kfo_ext: backend='auto' runs plain torch on cuda: native: {library.why_not(device)}; "
            f"triton: {triton_support.reason('cuda')}",
            RuntimeWarning,
            stacklevel=5,
        )
