"""Resources of the compiled CUDA kernels, read from the library itself without a driver or a GPU.

Registers, stack and static shared memory are recorded by the compiler; spills and 16-byte accesses are counted in the
machine code. Triton's cuobjdump reads it, as a toolkit may lack one.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from kfo_ext.ops.library import CUDA_LIBRARY

ELEMENTS = {"f": "float32", "d": "float64"}
# Static shared memory; the kernels' dynamic shared memory is in the table of launches.
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


class Row(NamedTuple):
    """One kernel for one architecture: registers per thread, bytes of stack, and instructions counted in its code."""

    kernel: str
    dtype: str
    arch: str
    registers: int
    stack_bytes: int
    spill_instructions: int  # loads and stores of local memory
    instructions: int
    copies: int  # global to shared, asynchronous
    copies_16_byte: int
    commits: int  # of the copies, without which no wait waits for them
    stores_16_byte: int  # to global memory
    loads_16_byte: int  # from global memory to registers


def spills(row: dict[str, object]) -> bool:
    """Whether registers spill in a row of CUDA or Triton."""
    return any(row.get(name) for name in ("stack_bytes", "spill_instructions", "spill_bytes"))


def cuobjdump() -> Path | None:
    """The program, or None if triton is not installed."""
    spec = find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return path if path and path.exists() else None


def rows(library: Path = CUDA_LIBRARY) -> list[Row]:
    """Read the resources of a library.

    Args:
        library: the library.

    Returns:
        A row per kernel, dtype and architecture.

    Raises:
        FileNotFoundError: there is no library, or no program to read it with.
    """
    program = cuobjdump()
    if program is None or not library.exists():
        raise FileNotFoundError(f"{library if program else 'cuobjdump (pip install triton)'}: not there")

    def dump(option: str) -> dict[str, str]:
        # One text per architecture: a library may hold several objects for each.
        text = subprocess.run([program, option, library], capture_output=True, text=True, check=True).stdout
        by_arch = defaultdict(str)
        for part in text.split("Fatbin elf code:")[1:]:
            by_arch[re.search(r"arch = (sm_\d+)", part)[1]] += part
        return by_arch

    code = {
        (arch, function): body
        for arch, text in dump("-sass").items()
        for function, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", text, re.DOTALL)
    }
    return sorted(
        _row(arch, function, int(registers), int(stack) + int(local), code[arch, function])
        for arch, text in dump("--dump-resource-usage").items()
        for function, registers, stack, _, local in _USAGE.findall(text)
    )


def _row(arch: str, function: str, registers: int, stack: int, body: str) -> Row:
    kernel, element = re.search(r"([a-z_]+_kernel)I([fd])E", function).groups()
    names = _INSTRUCTION.findall(body)

    def count(start: str, *parts: str) -> int:
        return sum(name.startswith(start) and all(part in name for part in parts) for name in names)

    return Row(
        kernel, ELEMENTS[element], arch, registers, stack, count("STL") + count("LDL"), len(names),
        count("LDGSTS"), count("LDGSTS", "128"), count("LDGDEPBAR"), count("STG", "128"),
        count("LDG.", "128"),
    )  # fmt: skip
