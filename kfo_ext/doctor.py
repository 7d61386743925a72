"""`kfo doctor`: what is built, what loads or why not, and whether each backend computes the right numbers."""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import kfo_ext
from kfo_ext.machine import processor_name
from kfo_ext.ops import library, triton_support
from kfo_ext.testing import CASES, OUTPUTS, TOLERANCE, Operands, random_operands, relative_error, run_backend, truth

TASKS = 3

# The backend and device of each entry of the report.
ROUTES = {
    "reference": ("reference", "cpu"),
    "cpu": ("native", "cpu"),
    "cuda": ("native", "cuda"),
    "triton": ("triton", "cuda"),
}


def examine(echo: Callable[[str], None]) -> dict[str, Any]:
    """Print the state of the installation.

    Args:
        echo: prints one line.

    Returns:
        The same as plain values; `healthy` is false if a backend that loads computes wrong numbers.
    """
    facts: dict[str, Any] = {
        "kfo_ext": kfo_ext.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "processor": processor_name(),
        "build": _build(),
        "backends": {},
        "healthy": True,
    }
    echo(f"kfo_ext {facts['kfo_ext']}, python {facts['python']}, torch {facts['torch']}")
    echo(f"processor: {facts['processor']}")
    echo(f"build: {', '.join(f'{name} {value}' for name, value in facts['build'].items())}")
    for name, (available, reason) in {**library.status(), "triton": triton_support.status()}.items():
        echo(f"{name}: {'loads' if available else 'not available'} ({reason})")
        backend: dict[str, Any] = {"loads": available, "reason": reason}
        facts["backends"][name] = backend
        if not available:
            continue
        if name == "cpu":
            backend["instruction_set"] = library.cpu_isa()
            echo(f"  instruction set in use: {backend['instruction_set']}")
        if name == "cuda" and not library.available(device := _cuda_device(), "cuda"):
            backend["does_not_run"] = library.why_not(device)
            echo(f"  does not run here: {backend['does_not_run']}")
            continue
        if ROUTES[name][1] == "cuda" and not torch.cuda.is_available():
            echo("  not tested: torch sees no CUDA device")
            continue
        backend["tests"] = []
        for text, test in _self_test(*ROUTES[name]):
            echo(f"  {text}")
            backend["tests"].append(test)
            facts["healthy"] &= test["ok"]
    return facts


def _cuda_device() -> torch.device:
    # Without a device that torch sees, the driver alone is in question.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cuda")


def _build() -> dict[str, str]:
    try:
        information = importlib.import_module("kfo_ext._plan").build_info()
    except ImportError as error:
        return {"nothing compiled is there": f"({error})"}
    return {str(name): str(value) for name, value in information.items()}


def _self_test(backend: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A line for each dtype and order, and the same as plain values."""
    for dtype, tolerance in TOLERANCE.items():
        kind = str(dtype).removeprefix("torch.")
        errors: dict[str, list[float]] = {name: [] for names in OUTPUTS.values() for name in names}
        try:
            for shapes in CASES.values():
                for name, error in _errors(backend, device, dtype, shapes).items():
                    errors[name].append(error)
        except Exception as failure:  # any error is a finding
            text = f"{type(failure).__name__}: {failure}"
            yield f"{dtype}: FAILED, {text}", {"dtype": kind, "ok": False, "failure": text}
            continue
        for order, names in OUTPUTS.items():
            # Not a number must fail the comparison, so the maximum is taken by torch, which keeps it.
            worst = torch.tensor([errors[name] for name in names], dtype=torch.float64).max().item()
            good = worst <= tolerance
            what = order.replace("_", " ")
            # JSON has no number for what is not finite.
            shown = worst if math.isfinite(worst) else str(worst)
            yield (
                f"{dtype} {what}: {'ok' if good else 'FAILED'}, relative error {worst:.1e}",
                {"dtype": kind, "order": order, "ok": good, "error": shown},
            )


def _errors(backend: str, device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """The relative error of every output, with R shared by all tasks and one L per task."""
    here = random_operands(shapes, TASKS, rows=(1, TASKS), dtype=dtype)
    found = run_backend(backend, Operands(*(operand.to(device) for operand in here)), shapes)
    return {name: relative_error(found[name].cpu(), right) for name, right in truth(here, shapes).items()}
