"""Resources of the compiled CUDA kernels, read from the library itself without a driver or a GPU.

Registers, stack and static shared memory are recorded by the compiler; spills and 16-byte accesses are counted in the
machine code. Triton's cuobjdump reads it, as a toolkit may lack one.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from kfo_ext.ops.library import CUDA_LIBRARY

ELEMENTS = {"f": "float32", "d": "float64"}
# Static shared memory; the kernels' dynamic shared memory is in the table of launches.
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# Address, name and operands.
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*)", re.MULTILINE)
_MULTIPLY_ADDS = ("FFMA", "DFMA")

_OPERANDS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


class Row(NamedTuple):
    """One kernel for one architecture: registers per thread, bytes of stack, and instructions counted in its code."""

    kernel: str
    dtype: str
    arch: str
    registers: int
    stack_bytes: int
    spill_instructions: int  # loads and stores of local memory
    instructions: int
    reciprocals: int  # each the start of a division
    copies: int  # global to shared, asynchronous
    before_copies: int  # instructions before the first of them
    copies_16_byte: int
    commits: int  # of the copies, without which no wait waits for them
    stores_16_byte: int  # to global memory
    loads_16_byte: int  # from global memory to registers
    shared_loads_16_byte: int
    loop: int  # instructions of the innermost loop that has the most multiply-adds
    loop_multiply_adds: int
    loads_together: int  # those of them of which four are issued before any is used


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
        by_arch: defaultdict[str, str] = defaultdict(str)
        for part in text.split("Fatbin elf code:")[1:]:
            by_arch[_found(r"arch = (sm_\d+)", part)[1]] += part
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


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    assert found, f"nothing like {pattern} in {text[:200]}"
    return found


def _row(arch: str, function: str, registers: int, stack: int, body: str) -> Row:
    kernel, element = _found(r"([a-z_]+_kernel)I([fd])E", function).groups()
    instructions = _INSTRUCTION.findall(body)
    names = [name for _, name, _ in instructions]

    def count(start: str, *parts: str) -> int:
        return sum(name.startswith(start) and all(part in name for part in parts) for name in names)

    return Row(
        kernel, ELEMENTS[element], arch, registers, stack, count("STL") + count("LDL"), len(names),
        count("MUFU", "RCP"), count("LDGSTS"),
        next((i for i, name in enumerate(names) if name.startswith("LDGSTS")), 0),
        count("LDGSTS", "128"), count("LDGDEPBAR"), count("STG", "128"),
        count("LDG.", "128"), count("LDS", "128"), *_inner_loop(instructions),
        sum(size for size in load_groups(body) if size >= 4),
    )  # fmt: skip


def _inner_loop(instructions: Sequence[tuple[str, str, str]]) -> tuple[int, int]:
    """Find the innermost loop with the most multiply-adds; a loop lies between a branch and its earlier target.

    Returns:
        Its instructions, and the multiply-adds among them; zeros if no loop has any.
    """
    place = {int(address, 16): i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for i, (_, name, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        start = place.get(int(target[1], 16), i + 1) if target else i + 1
        if start < i:
            loops.append((start, i + 1))
    innermost = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] for b in loops if b != a)]
    counted = [
        (sum(name.startswith(_MULTIPLY_ADDS) for _, name, _ in instructions[start:end]), end - start)
        for start, end in innermost
    ]
    multiply_adds, length = max(counted, default=(0, 0))
    return (length, multiply_adds) if multiply_adds else (0, 0)


def load_groups(body: str) -> list[int]:
    """How many 16-byte loads from global memory are issued before one's result is read, group by group."""
    groups: list[list[set[int]]] = [[]]
    for name, operands in _OPERANDS.findall(body):
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        # A store has no result; of others the first register is.
        read = registers if name.startswith("ST") else registers[1:]
        if any(number in result for number in read for result in groups[-1]):
            groups.append([])
        if name.startswith("LDG.") and "128" in name and registers:
            groups[-1].append(set(range(registers[0], registers[0] + 4)))
    return [len(group) for group in groups if group]
