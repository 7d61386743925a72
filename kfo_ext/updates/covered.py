"""Selects the parameters that an update covers; the others follow gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from kfo_ext.ops.parts import Parts
from kfo_ext.packing import Packing, some


def matches(name: str, pattern: str) -> bool:
    """Whether the name is the pattern, or matches it by fnmatch."""
    return name == pattern or fnmatchcase(name, pattern)


def matching(names: Sequence[str], patterns: Iterable[str], argument: str) -> list[int]:
    """Find the names that equal, or match by fnmatch, at least one pattern.

    Args:
        names: of the parameters.
        patterns: names or patterns such as "head.*".
        argument: name of the argument that gave the patterns, for messages.

    Returns:
        The positions of the names, in order.

    Raises:
        TypeError: `patterns` is not an iterable of strings.
        ValueError: there is no pattern, or one that no name matches.
    """
    given = type(patterns).__name__
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        hint = ": put it in a list" if isinstance(patterns, str) else ""
        raise TypeError(f"{argument}: expected a list of names or patterns such as 'head.*', got {given}{hint}")
    patterns = list(patterns)
    for i, pattern in enumerate(patterns):
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}[{i}]: expected a name or a pattern, got {type(pattern).__name__}")
    if not patterns:
        raise ValueError(f"{argument}: expected at least one name or pattern such as 'head.*', got none")
    found: set[int] = set()
    for pattern in patterns:
        hits = [i for i, name in enumerate(names) if matches(name, pattern)]
        if not hits:
            raise ValueError(
                f"{argument}: {pattern!r} matches no parameter: they are {some(list(map(repr, names)), 8)}"
                + ("; pass model.named_parameters() for names" if all(map(str.isdigit, names)) else "")
            )
        found.update(hits)
    return sorted(found)


class Covered:
    """The covered tensors of a packing.

    Args:
        packing: of all parameters.
        indices: positions of the covered ones, in order.
    """

    def __init__(self, packing: Packing, indices: Sequence[int]) -> None:
        self.indices = tuple(indices)
        self.all = len(self.indices) == len(packing)
        self.packing = packing if self.all else packing.part(self.indices)
        self._columns = packing.numel
        covered = set(self.indices)
        self._parts = Parts([i in covered for i in range(len(packing))], packing.sizes)

    def rule(self, rule: Callable[[Tensor], Tensor], G: Tensor) -> Tensor:
        """U(G), (tasks, n): `rule` of the covered columns, (tasks, self.packing.numel), and G itself elsewhere."""
        if self.all:
            return rule(G)
        if G.dim() != 2 or G.shape[1] != self._columns:
            raise ValueError(f"G: expected shape (tasks, {self._columns}), got {tuple(G.shape)}")
        parts = self._parts.apart(G)
        return self._parts.together({**parts, True: rule(parts[True])})
