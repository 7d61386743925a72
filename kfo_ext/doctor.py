"""`kfo doctor`: what is built, what loads and why not, and whether each backend computes the right numbers."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kfo_ext
from kfo_ext.functional import transform
from kfo_ext.machine import processor_name
from kfo_ext.ops import library, triton_support
from kfo_ext.problems import Problems

# A conv, a linear and a bias problem, none of them square, with sizes on both sides of the vector widths.
SHAPES = ((8, 5, 9), (1, 7, 33), (1, 7, 1))
TASKS = 3
ORDERS = ("forward", "backward", "double backward")
# Error allowed, relative to the largest entry of an output.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

# Entry of the report to the backend and the device that reach it.
ROUTES = {
    "reference": ("reference", "cpu"),
    "cpu": ("native", "cpu"),
    "cuda": ("native", "cuda"),
    "triton": ("triton", "cuda"),
}


def examine(echo: Callable[[str], None]) -> bool:
    """Print the state of the installation.

    echo: takes one line at a time.
    out: false if a backend that loads gives wrong numbers.
    """
    echo(f"kfo_ext {kfo_ext.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    echo(f"processor: {processor_name()}")
    echo(f"build: {_build()}")
    healthy = True
    for name, (available, reason) in {**library.status(), "triton": triton_support.status()}.items():
        echo(f"{name}: {'loads' if available else 'not available'} ({reason})")
        if not available:
            continue
        if name == "cpu":
            echo(f"  instruction set in use: {library.cpu_isa()}")
        if ROUTES[name][1] == "cuda" and not torch.cuda.is_available():
            echo("  not tested: torch sees no CUDA device")
            continue
        for text, good in _self_test(*ROUTES[name]):
            echo(f"  {text}")
            healthy &= good
    return healthy


def _build() -> str:
    try:
        information = importlib.import_module("kfo_ext._plan").build_info()
    except ImportError as error:
        return f"nothing compiled is there ({error})"
    return ", ".join(f"{k} {v}" for k, v in information.items()) if isinstance(information, dict) else str(information)


def _self_test(backend: str, device: str) -> Iterator[tuple[str, bool]]:
    for dtype, tolerance in TOLERANCE.items():
        try:
            truth = _orders("reference", "cpu", torch.float64)
            found = _orders(backend, device, dtype)
        except Exception as error:  # whatever it is, it is the finding
            yield f"{dtype}: FAILED, {type(error).__name__}: {error}", False
            continue
        for order, right, ours in zip(ORDERS, truth, found, strict=True):
            error = max(_error(a, b) for a, b in zip(ours, right, strict=True))
            good = error <= tolerance
            yield f"{dtype} {order}: {'ok' if good else 'FAILED'}, relative error {error:.1e}", good


def _orders(backend: str, device: str, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Outputs of the three orders on operands that are the same float32 numbers for every backend and dtype."""
    problems = Problems(SHAPES)
    generator = torch.Generator().manual_seed(0)

    def operand(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(device, dtype).requires_grad_()

    n_R, n_G, n_L = (packing.numel for packing in (problems.R, problems.packing, problems.L))
    R, G, L, dY = operand(1, n_R), operand(TASKS, n_G), operand(TASKS, n_L), operand(TASKS, n_G)
    cotangents = [operand(1, n_R), operand(TASKS, n_G), operand(TASKS, n_L)]
    Y = transform(R, G, L, problems, backend=backend)
    first = torch.autograd.grad(Y, (R, G, L), dY, create_graph=True)
    second = torch.autograd.grad(first, (R, G, L, dY), cotangents)
    return [(Y,), first, second]


def _error(ours: Tensor, truth: Tensor) -> float:
    # Not a number must fail every comparison, so the maximum is taken by torch, which keeps it.
    return ((ours.cpu().double() - truth).abs().max() / truth.abs().max()).item()
