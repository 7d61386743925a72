"""Registers, shared memory and spills of the Triton kernels, compiled ahead of time without a GPU.

Triton compiles to a cubin with its own ptxas, and the cubin records its resources: no driver and no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kfo_ext.ops import triton_support
from kfo_ext.ops.transform.triton import launch
from kfo_ext.ops.transform.triton.options import SUM_ROWS, group_options, product_options, sum_options
from kfo_ext.ops.transform.triton.outputs import FORMS
from kfo_ext.ops.transform.triton.plan import SUM_COLUMNS, plan_of
from kfo_ext.problems import Problems
from kfo_ext.testing import model_case

ARCHITECTURES = (80, 90, 100)
DTYPES = {torch.float32: "fp32", torch.float64: "fp64"}
# The paper's groups: Omniglot's, and those with the widths of CIFAR-FS and mini-ImageNet.
GROUPS: dict[str, list[tuple[int, int, int]]] = {
    "omniglot_cnn4": model_case(4),
    "cifar_fs_cnn4": [(32, 3, 9), (32, 32, 9), (1, 32, 1), (1, 5, 32), (1, 5, 1)],
    "mini_imagenet_cnn4": [(64, 3, 9), (64, 64, 9), (1, 64, 1), (1, 5, 1)],
}
# Results (m, n) of tiled products: the head of mini-ImageNet, its L, and softmax regression.
PRODUCTS = {"head_G": (5, 1600), "head_R": (5, 5), "square": (784, 784)}


class Row(NamedTuple):
    """The resources of one compiled kernel, per thread (registers, spill) and per block (shared)."""

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def rows(
    groups: Iterable[str] = GROUPS,
    products: Iterable[str] = PRODUCTS,
    architectures: Iterable[int] = ARCHITECTURES,
    dtypes: Iterable[torch.dtype] = tuple(DTYPES),
) -> Iterator[Row]:
    """Compile the kernels; a kernel shared by several groups is compiled once.

    Args:
        groups: names of groups of `GROUPS`.
        products: names of products of `PRODUCTS`.
        architectures: compute capabilities.
        dtypes: dtypes.

    Yields:
        One row per kernel, dtype and architecture.

    Raises:
        RuntimeError: Triton's interpreter is on, so there is nothing to compile.
    """
    if triton_support.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled under the interpreter")
    for arch in architectures:
        for dtype in dtypes:
            seen = set()
            for label, kernel, constants, options in configurations(groups, products, dtype):
                key = (kernel, str(constants))
                if key not in seen:
                    seen.add(key)
                    yield _row(f"{kernel}[{label},{DTYPES[dtype]}]", arch, kernel, DTYPES[dtype], constants, options)


def configurations(
    groups: Iterable[str], products: Iterable[str], dtype: torch.dtype
) -> Iterator[tuple[str, str, dict, dict]]:
    """(label, kernel, constexprs, compiler options) with all operands present and all outputs needed."""
    for group in groups:
        classes = plan_of(Problems(GROUPS[group]).flat).classes
        for slots in FORMS:
            label = "".join("RGLY"[slot] for slot in slots)
            constants = {"SLOTS": slots, "CLASSES": classes}
            yield f"{label},{group}", "form_kernel", constants, group_options(classes)
    for product in products:
        options = product_options(*PRODUCTS[product], dtype)
        blocks = {name: options.pop(name) for name in ("BM", "BN", "BK")}
        for turned in ((False, False), (True, False), (False, True)):
            flags = {"HAS_2": True, "HAS_BIAS": False, "TRANS_A": turned[0], "TRANS_B": turned[1]}
            label = product + "".join(f",{side}^T" for side, yes in zip("AB", turned) if yes)
            yield label, "product_kernel", flags | blocks, options
    shared = {"SHARED_R": True, "SHARED_L": False, "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}
    yield "any", "sum_kernel", shared, sum_options()


def _row(label: str, arch: int, kernel: str, element: str, constants: dict, options: dict) -> Row:
    from triton.backends.compiler import GPUTarget

    compiled = compile_for(GPUTarget("cuda", arch, 32), kernel, element, constants, options)
    registers, spills = _usage(compiled.asm["ptx"], arch)
    return Row(label, f"sm_{arch}", registers, compiled.metadata.shared, spills)


def compile_for(target: Any, kernel: str, element: str, constants: dict, options: dict) -> Any:
    """What Triton makes of a kernel for a GPU that need not be there; target: its `GPUTarget`."""
    import triton
    from triton.compiler import ASTSource

    function = getattr(launch._kernels(), kernel)
    signature = {name: _type(name, element) for name in function.arg_names}
    return triton.compile(ASTSource(function, signature, constants), target=target, options=options)


def _type(name: str, element: str) -> str:
    if name == "p_table":
        return "*i64"
    return f"*{element}" if name.startswith("p_") else "i32" if name.startswith(("s_", "n_")) else "constexpr"


def _usage(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread, and bytes of spill stores and loads, as counted by triton's ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(path), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    return registers, sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
