"""`transform`: Y = R^T G L for every problem of every task, on the best backend that runs here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kfo_ext.transform import autograd, native, reference, triton_launch
from kfo_ext.transform.autograd import Family
from kfo_ext.transform.checks import check
from kfo_ext.transform.operands import check_dimensions, check_tensors, in_one_dtype, ready
from kfo_ext.transform.problems import Problems

BACKENDS = ("auto", "native", "triton", "reference")


def _register_triton(library: torch.library.Library) -> Family:
    triton_launch.define(library)
    return autograd.register(library, "_triton")


# The compiled operators; None where the CPU library, which holds their schemas, is not there.
NATIVE = native.once("transform", autograd.register) if native.status()["cpu"][0] else None
# Defined in Python, so there without the CPU library, and without triton, which the first call asks for.
TRITON = native.once("triton", _register_triton)


def resolve(backend: str, device: torch.device) -> str:
    """The family that `backend` means on `device`.

    "auto" is native where its kernels are loaded; else on CUDA triton where it is installed; else reference. On CUDA
    that last step warns, with both reasons; on CPU importing kfo_ext has warned already. On CPU it is never triton,
    whose interpreter there is for tests.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a named backend that does not run here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if native.available(device):
            return "native"
        if device.type == "cuda":
            if triton_launch.available(device):
                return "triton"
            _warn_plain_torch()
        return "reference"
    if backend == "native" and not native.available(device):
        raise RuntimeError(f"backend 'native' does not run on {device.type}: {why_not_native(device.type)}")
    if backend == "triton" and not triton_launch.available(device):
        raise RuntimeError(f"backend 'triton' does not run on {device.type}: {triton_launch.reason(device.type)}")
    return backend


def why_not_native(device_type: str) -> str:
    return native.status().get(device_type, (False, f"there are no kernels for {device_type} tensors"))[1]


def _warn_plain_torch() -> None:
    # A compiled graph is traced once and cannot warn.
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"kfo_ext: backend='auto' runs plain torch on cuda: native: {why_not_native('cuda')}; "
            f"triton: {triton_launch.reason('cuda')}",
            RuntimeWarning,
            stacklevel=5,
        )


def transform(
    R: Tensor, G: Tensor, L: Tensor, problems: Problems, *, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Y = R^T G L (+ bias), differentiable to any order by every operand.

    Before a call is captured in a CUDA graph, make it once with the same problems and tasks.

    Args:
        R: (tasks or 1, problems.R.numel), packed left factors.
        G: (tasks, problems.packing.numel), packed matrices.
        L: (tasks or 1, problems.L.numel), packed right factors.
        problems: the group.
        bias: (tasks or 1, problems.bias.numel), added to each of the B matrices of a problem.
        backend: "auto" (see `resolve`), "native" (compiled), "triton" (compiled at the first call) or "reference"
            (plain torch). Under torch.func transforms and forward-mode AD every backend runs plain torch, which has all
            their rules.

    Returns:
        Y: (tasks, problems.packing.numel), of G's dtype. Half types, and everything under autocast, compute in float32.

    Raises:
        ValueError: sizes, rows or devices that do not fit, or an unknown backend.
        TypeError: operands that are no dense floating-point tensors or, outside autocast, of several dtypes.
        RuntimeError: the backend asked for does not run here.

    Source: paper, appendix C.1 (W = R^T (x) L, the factorised weight of equation 21).
    """
    given = (G, R, L) if bias is None else (G, R, L, bias)

    def compute(family: Family | None, G: Tensor, R: Tensor, L: Tensor, bias: Tensor | None = None) -> Tensor:
        if family is None:
            check("transform", problems.columns, R, G, L, bias=bias)
            return reference.transform(R, G, L, problems.flat, bias)
        return family.transform(R, G, L, problems.flat, bias)

    return _on_backend(compute, given, problems, backend)


def adjoint(R: Tensor, G: Tensor, L: Tensor, problems: Problems, *, backend: str = "auto") -> Tensor:
    """R G L^T, the adjoint of `transform`: <transform(R, X, L), G> = <X, adjoint(R, G, L)>; no factor is transposed.

    Args, Returns, Raises: as `transform`.
    """

    def compute(family: Family | None, G: Tensor, R: Tensor, L: Tensor) -> Tensor:
        if family is None:
            check("adjoint", problems.columns, R, G, L)
            return reference.adjoint(R, G, L, problems.flat)
        # The transform's own derivative by its matrices, which are not read for it: what stands there is of no account.
        return family.backward(R, G.detach(), L, G, problems.flat, [False, True, False])[1]

    return _on_backend(compute, (G, R, L), problems, backend)


def _on_backend(compute: Callable[..., Tensor], given: tuple[Tensor, ...], problems: Problems, backend: str) -> Tensor:
    """compute(family, G, R, L, bias) after a check of what the user gave; family None is plain torch."""
    if not isinstance(problems, Problems):
        raise TypeError(f"problems: expected Problems, got {type(problems).__name__}")
    usual = ready(given) and all(operand.dim() == 2 for operand in given)
    if not usual:
        operands = dict(zip(("G", "R", "L", "bias"), given))
        check_tensors(operands)
        for name, operand in operands.items():
            check_dimensions(name, operand, ("tasks", "elements"))
    name = resolve(backend, given[0].device)
    plain = name == "reference" or autograd.transformed()
    family = None if plain else TRITON if name == "triton" else NATIVE
    return compute(family, *given) if usual else in_one_dtype(partial(compute, family), operands)
