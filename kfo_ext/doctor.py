"""`kfo doctor`: what is built, what loads and why not, and whether each backend computes the right numbers."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator, Sequence

import torch

import kfo_ext
from kfo_ext.machine import processor_name
from kfo_ext.ops import library, triton_support
from kfo_ext.testing import CASES, OUTPUTS, TOLERANCE, Operands, random_operands, relative_error, run_backend, truth

TASKS = 3

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
    """A line for each dtype and order, and whether it holds for every case."""
    for dtype, tolerance in TOLERANCE.items():
        errors: dict[str, list[float]] = {name: [] for names in OUTPUTS.values() for name in names}
        try:
            for shapes in CASES.values():
                for name, error in _errors(backend, device, dtype, shapes).items():
                    errors[name].append(error)
        except Exception as failure:  # whatever it is, it is the finding
            yield f"{dtype}: FAILED, {type(failure).__name__}: {failure}", False
            continue
        for order, names in OUTPUTS.items():
            # Not a number must fail the comparison, so the maximum is taken by torch, which keeps it.
            worst = torch.tensor([errors[name] for name in names], dtype=torch.float64).max().item()
            good = worst <= tolerance
            what = order.replace("_", " ")
            yield f"{dtype} {what}: {'ok' if good else 'FAILED'}, relative error {worst:.1e}", good


def _errors(backend: str, device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """The relative error of every output, R shared by all tasks and L of each its own."""
    here = random_operands(shapes, TASKS, rows=(1, TASKS), dtype=dtype)
    found = run_backend(backend, Operands(*(operand.to(device) for operand in here)), shapes)
    return {name: relative_error(found[name].cpu(), right) for name, right in truth(here, shapes).items()}
