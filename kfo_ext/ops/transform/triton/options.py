"""Block sizes and compiler options of the kernels, chosen by their spills: `bench/triton_resources.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfo_ext.ops.transform.triton.plan import pad

SUM_ROWS = 16


def _options(warps: int, all_registers: bool = False) -> dict[str, Any]:
    # Contraction is said, because later versions of Triton leave it out by default.
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    # Left alone, ptxas aims at 128 registers here, and spills. AMD's compiler has no such option.
    return options | {"maxnreg": 248} if all_registers and torch.version.hip is None else options


def group_options(classes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Compiler options of `form_kernel`.

    Args:
        classes: the padded (p, q) of the group's small problems.

    Returns:
        Keyword arguments of its launch.
    """
    if max(map(max, classes)) <= 32:
        return _options(4)
    return _options(8, all_registers=True)


def product_options(m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes and compiler options of `product_kernel`.

    Args:
        m: rows of the result.
        n: columns of the result.
        dtype: of operands and result.

    Returns:
        Keyword arguments of its launch.
    """
    side, warps = (64, 8) if dtype == torch.float32 else (32, 4)
    return {"BM": min(side, pad(m)), "BN": min(side, pad(n)), "BK": 16, **_options(warps, all_registers=True)}


def sum_options() -> dict[str, Any]:
    """Compiler options of `sum_kernel`."""
    return _options(4)
