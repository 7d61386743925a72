"""How the Triton kernels divide a group: the classes of padded sizes, the chunks of B, and the tables on the device.

All of it comes from the shapes alone, never from the number of tasks or the device: results stay bit-equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.ops.transform.checks import Columns

# The smallest side of a block that tl.dot takes on every GPU.
MIN_BLOCK = 16
# The largest padded p * q of a problem that a program holds whole (64 x 16, 32 x 32, 16 x 64): beyond, registers spill.
SMALL = 1024
# The most partial sums per problem and task: enough programs for a GPU, little traffic.
MAX_CHUNKS = 8
# A row of the sum table has a multiple of SUM_COLUMNS elements, and a factor at most MAX_SUM_ROWS rows.
SUM_COLUMNS = 128
MAX_SUM_ROWS = 512
_INT64_MAX = 2**63 - 1


def pad(size: int) -> int:
    """The block side that holds `size`: a power of two."""
    return max(MIN_BLOCK, 1 << (size - 1).bit_length())


class Part(NamedTuple):
    """One problem: B matrices (p, q), and where they lie.

    Attributes:
        B: number of matrices.
        p: rows of each.
        q: columns of each.
        R: offset of the left factor in its packed row; offsets are in elements.
        G: offset of the matrices.
        L: offset of the right factor.
        bias: offset of the bias.
        part_R: offset of the partial sums of dR.
        part_L: offset of the partial sums of dL.
        chunk: matrices of a chunk; the last chunk may have fewer.
    """

    B: int
    p: int
    q: int
    R: int
    G: int
    L: int
    bias: int
    part_R: int
    part_L: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Number of chunks of B."""
        return -(-self.B // self.chunk)

    @property
    def small(self) -> bool:
        """Whether one program holds a matrix of this problem whole."""
        return pad(self.p) * pad(self.q) <= SMALL


class Plan:
    """The work of one group. Get it from `plan_of`, which makes it once per group.

    Args:
        shapes: flat (B, p, q) triples.

    Raises:
        ValueError: anything but positive triples, or a packed row that 64 bits cannot address.
    """

    def __init__(self, shapes: Sequence[int]) -> None:
        if len(shapes) % 3:
            raise ValueError(f"shapes: expected (B, p, q) triples, got {len(shapes)} integers")
        self.R = self.G = self.L = self.bias = self.part_R = self.part_L = 0
        parts = []
        for B, p, q in zip(shapes[::3], shapes[1::3], shapes[2::3]):
            if min(B, p, q) < 1:
                raise ValueError(f"shapes: B, p and q must be at least 1, got [{(B, p, q)}]")
            part = Part(B, p, q, self.R, self.G, self.L, self.bias, self.part_R, self.part_L, -(-B // MAX_CHUNKS))
            parts.append(part)
            self.R += p * p
            self.G += B * p * q
            self.L += q * q
            self.bias += p * q
            self.part_R += part.chunks * p * p
            self.part_L += part.chunks * q * q
        if max(self.G, self.part_R, self.part_L) > _INT64_MAX:
            raise ValueError("shapes: the group is too large to address with 64 bits")
        self.parts = tuple(parts)
        self.columns = Columns(tuple(part[:3] for part in parts), self.R, self.G, self.L, self.bias)
        small = [part for part in parts if part.small]
        self.large = tuple(part for part in parts if not part.small)
        self.classes = tuple(sorted({(pad(part.p), pad(part.q)) for part in small}, reverse=True))
        # Without chunks to add up, a factor with a row per task needs no second launch.
        self.single = all(part.chunks == 1 for part in parts)
        self.work_rows = sum(part.chunks for part in small)
        self._tables: dict[tuple, Tensor] = {}

    def work(self, device: torch.device) -> Tensor:
        """The work table of `form_kernel`; `kernels` describes its columns.

        Args:
            device: where it lies; made at the first call for each device, and kept.

        Returns:
            (work_rows, 10), int64, largest class first.
        """
        return self._table("work", device)

    def sums(self, device: torch.device, sum_R: bool, sum_L: bool) -> Tensor:
        """The table of `sum_kernel`; `kernels` describes its columns.

        Args:
            device: where it lies; made at the first call for each device, and kept.
            sum_R: whether the partial sums of dR are added.
            sum_L: whether those of dL are.

        Returns:
            (rows, 6), int64.
        """
        return self._table(("sums", sum_R, sum_L), device)

    def _table(self, key: str | tuple, device: torch.device) -> Tensor:
        # Never freed: a captured CUDA graph reads it at every replay.
        table = self._tables.get((key, device))
        if table is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "backend 'triton': the first call with a group compiles kernels and uploads its table, "
                    "which a CUDA graph cannot capture: make the same call once before capturing"
                )
            rows = self._work_rows() if key == "work" else self._sum_rows(*key[1:])
            table = self._tables[key, device] = torch.tensor(rows, dtype=torch.int64).to(device)
        return table

    def _work_rows(self) -> list[list[int]]:
        rows = []
        for part in self.parts:
            if not part.small:
                continue
            B, p, q = part[:3]
            own = self.classes.index((pad(p), pad(q)))
            for i in range(part.chunks):
                first = i * part.chunk
                count = min(part.chunk, B - first)
                at = (
                    part.R,
                    part.L,
                    part.G + first * p * q,
                    part.bias,
                    part.part_R + i * p * p,
                    part.part_L + i * q * q,
                )
                rows.append([own, p, q, count, *at])
        return sorted(rows, key=lambda row: row[0])

    def _sum_rows(self, sum_R: bool, sum_L: bool) -> list[list[int]]:
        factors = [(0, part.R, part.part_R, part.p**2, part.chunks) for part in self.parts if sum_R]
        factors += [(1, part.L, part.part_L, part.q**2, part.chunks) for part in self.parts if sum_L]
        rows = []
        for which, to, start, size, chunks in factors:
            step = SUM_COLUMNS * -(-size // (SUM_COLUMNS * MAX_SUM_ROWS))
            rows += [[which, to + i, start + i, min(step, size - i), size, chunks] for i in range(0, size, step)]
        return rows


@cache
def _plan(shapes: tuple[int, ...]) -> Plan:
    return Plan(shapes)


def plan_of(shapes: Sequence[int]) -> Plan:
    """The plan of a group, made once.

    Args:
        shapes: flat (B, p, q) triples.

    Returns:
        The same object for equal shapes.

    Raises:
        ValueError: as `Plan`.
    """
    return _plan(tuple(shapes))
