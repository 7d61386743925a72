"""Operand checks of the three operators in Python; same messages as `csrc/check_transform.h`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.ops.operands import KERNEL_DTYPES


class Columns(NamedTuple):
    """The number of elements of one packed row of each operand of a group."""

    shapes: tuple[tuple[int, int, int], ...]
    R: int
    G: int
    L: int
    bias: int


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Operands:
    """Checks operands against their group; messages name the op, the operand, the expected and the received value.

    Args:
        op: the name of the op, for messages.
        columns: the columns of the group.
        G: (tasks, sum B*p*q), the operand that determines tasks, dtype and device.

    Raises:
        ValueError: an operand does not fit; every method raises it.
    """

    def __init__(self, op: str, columns: Columns, G: Tensor) -> None:
        self.op = op
        self.group = columns
        self.G = G
        if G.dtype not in KERNEL_DTYPES:
            self._fail(f"G has {_name(G.dtype)}, expected float32 or float64")
        self._columns("G", G, columns.G)
        self.tasks = G.shape[0]

    def factor(self, name: str, X: Tensor, columns: int) -> None:
        """Check X, (tasks or 1, columns)."""
        self._alike(name, X)
        self._columns(name, X, columns)
        if X.shape[0] not in (1, self.tasks):
            self._fail(f"{name} has {X.shape[0]} rows, but G has {self.tasks} tasks: expected 1 or that many")

    def matrices(self, name: str, X: Tensor) -> None:
        """Check X, (tasks, sum B*p*q)."""
        self._alike(name, X)
        self._columns(name, X, self.group.G)
        self._rows(name, X, self.tasks, "G")

    def like(self, name: str, X: Tensor, other_name: str, other: Tensor) -> None:
        """Check that X has the shape of `other`, which was checked before."""
        self._alike(name, X)
        self._columns(name, X, other.shape[1])
        self._rows(name, X, other.shape[0], other_name)

    def need(self, flags: Sequence[bool], expected: int) -> None:
        """Check that there is one flag per output."""
        if len(flags) != expected:
            self._fail(f"need has {len(flags)} flags, expected {expected}")

    def _fail(self, message: str) -> None:
        raise ValueError(f"{self.op}: {message}")

    def _alike(self, name: str, X: Tensor) -> None:
        if X.dtype != self.G.dtype:
            self._fail(f"{name} has {_name(X.dtype)}, but G has {_name(self.G.dtype)}: expected one dtype")
        if X.device != self.G.device:
            self._fail(f"{name} is on {X.device}, but G is on {self.G.device}: expected one device")

    def _columns(self, name: str, X: Tensor, expected: int) -> None:
        if X.dim() != 2:
            self._fail(f"{name} has {X.dim()} dimensions, expected 2: (tasks, columns)")
        if X.shape[1] != expected:
            self._fail(f"{name} has {X.shape[1]} columns, but shapes {list(self.group.shapes)} need {expected}")

    def _rows(self, name: str, X: Tensor, expected: int, other_name: str) -> None:
        if X.shape[0] != expected:
            self._fail(f"{name} has {X.shape[0]} rows, but {other_name} has {expected}")


def check(
    op: str,
    columns: Columns,
    R: Tensor,
    G: Tensor,
    L: Tensor,
    *,
    bias: Tensor | None = None,
    dY: Tensor | None = None,
    ddR: Tensor | None = None,
    ddG: Tensor | None = None,
    ddL: Tensor | None = None,
    need: tuple[Sequence[bool], int] | None = None,
) -> int:
    """Check every operand that is not None.

    Args:
        op: the name of the op, for messages.
        columns: the columns of the group.
        R: (tasks or 1, sum p*p).
        G: (tasks, sum B*p*q).
        L: (tasks or 1, sum q*q).
        bias: (tasks or 1, sum p*q).
        dY: the shape of G.
        ddR: the shape of R.
        ddG: the shape of G.
        ddL: the shape of L.
        need: the flags, and their expected number.

    Returns:
        The number of tasks.

    Raises:
        ValueError: an operand does not fit.
    """
    operands = Operands(op, columns, G)
    operands.factor("R", R, columns.R)
    operands.factor("L", L, columns.L)
    if bias is not None:
        operands.factor("bias", bias, columns.bias)
    if dY is not None:
        operands.matrices("dY", dY)
    if ddR is not None:
        operands.like("ddR", ddR, "R", R)
    if ddG is not None:
        operands.matrices("ddG", ddG)
    if ddL is not None:
        operands.like("ddL", ddL, "L", L)
    if need is not None:
        operands.need(*need)
    return operands.tasks
