"""Packed rows: the parameters (or gradients) of one model, flattened one after the other, one row per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from kfo_ext.ops.operands import check_dense, ready
from kfo_ext.ops.own_code import own_code
from kfo_ext.ops.parts import plain
from kfo_ext.ops.registration import pick

T = TypeVar("T")

# A generator that another update consumed is empty.
NO_PARAMETERS = (
    "parameters: expected at least one parameter, got none; a generator such as model.named_parameters() can be read "
    "once, so make a list of it for several updates"
)


def listed(tensors: Iterable[Any], argument: str, *, pairs: bool = False) -> list[Any]:
    """Return the entries of an iterable of tensors or, with `pairs`, of (name, tensor) pairs too.

    Args:
        tensors: the iterable.
        argument: its name, for messages.
        pairs: whether pairs are allowed.

    Returns:
        The entries, unchecked.

    Raises:
        TypeError: `tensors` is not iterable, or is a tensor, a mapping, a string or a module.
    """
    if isinstance(tensors, Iterable) and not isinstance(tensors, (Tensor, Mapping, str, nn.Module)):
        return list(tensors)
    got = type(tensors).__name__
    if isinstance(tensors, Tensor):
        got = f"one {got}: put it in a list"
    elif isinstance(tensors, Mapping):
        got += ": pass its .items()"
    elif isinstance(tensors, nn.Module):
        got += f": pass its {'.named_parameters()' if pairs else '.parameters()'}"
    raise TypeError(
        f"{argument}: expected an iterable of tensors{' or (name, tensor) pairs' if pairs else ''}, got {got}"
    )


def name_parameters(parameters: Iterable[Tensor | tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Pair every parameter with a name: its own for a (name, tensor) pair, else its position.

    Args:
        parameters: tensors or (name, tensor) pairs.

    Returns:
        (name, tensor) pairs, in order.

    Raises:
        TypeError: an entry is neither a tensor nor a (name, tensor) pair.
        ValueError: a name occurs twice.
    """
    named: list[tuple[str, Tensor]] = []
    for i, entry in enumerate(listed(parameters, "parameters", pairs=True)):
        pair = entry if isinstance(entry, tuple) else (str(i), entry)
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
            kind = type(entry).__name__
            if isinstance(entry, tuple):
                kind = f"({', '.join(type(part).__name__ for part in entry)})"
            raise TypeError(f"parameters[{i}]: expected a tensor or a (name, tensor) pair, got {kind}")
        named.append(pair)
    names = [name for name, _ in named]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"parameters: the name {twice!r} occurs twice")
    return named


def some(texts: Sequence[str], most: int = 3) -> str:
    """The first `most` texts, and the number of the others."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


class Packing:
    """Where each named tensor of a list lies in a packed row.

    Args:
        names: one name per tensor, used in messages.
        shapes: one shape per tensor, without the task dimension.
        named: whether the names are the user's, rather than positions.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[torch.Size], *, named: bool = True) -> None:
        self.names = tuple(names)
        self.named = named
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.sizes = [shape.numel() for shape in self.shapes]
        # torch reads a plain tuple in half the time of a torch.Size.
        self._views = [tuple(shape) for shape in self.shapes]
        self.numel = sum(self.sizes)

    @classmethod
    def of(cls, parameters: Iterable[Tensor | tuple[str, Tensor]]) -> Packing:
        """The packing of the given tensors or (name, tensor) pairs."""
        entries = listed(parameters, "parameters", pairs=True)
        pairs = name_parameters(entries)
        named = all(isinstance(entry, tuple) for entry in entries)
        return cls([name for name, _ in pairs], [tensor.shape for _, tensor in pairs], named=named)

    def part(self, indices: Sequence[int]) -> Packing:
        """The packing of some of the tensors."""
        return Packing([self.names[i] for i in indices], [self.shapes[i] for i in indices], named=self.named)

    def in_order(self, tensors: Mapping[str, Any], argument: str) -> list[Any]:
        """Return the values of a mapping in the order of the packing.

        Args:
            tensors: values by name.
            argument: the mapping's name, for messages.

        Returns:
            One value per tensor of the packing.

        Raises:
            ValueError: a name is missing or unknown, or the tensors of this packing have no names.
        """
        if not self.named:
            raise ValueError(
                f"{argument}: expected a list, got a {type(tensors).__name__}: this update was made of tensors without "
                "names; build it from (name, tensor) pairs, such as model.named_parameters(), to match them by name"
            )
        missing = [repr(name) for name in self.names if name not in tensors]
        known = set(self.names)
        unknown = [repr(name) for name in tensors if name not in known]
        if missing or unknown:
            wrong = "; ".join(
                f"{what} {some(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names
            )
            raise ValueError(f"{argument}: expected one tensor for each of {self.described()}; got {wrong}")
        return [tensors[name] for name in self.names]

    def by_name(self, tensors: Iterable[T], like: Mapping[str, Any]) -> dict[str, T]:
        """Values in the order of the packing, by name in the order of `like`; the inverse of `in_order`."""
        found = dict(zip(self.names, tensors))
        return {name: found[name] for name in like}

    def __len__(self) -> int:
        return len(self.sizes)

    def described(self, indices: Iterable[int] | None = None) -> str:
        """The names and shapes of the first few tensors, or of those of `indices`, for messages."""
        chosen = list(range(len(self)) if indices is None else indices)
        return some([f"{self.names[i]!r} {tuple(self.shapes[i])}" for i in chosen])

    def tasks(self, tensors: Sequence[Tensor | None], argument: str) -> int | None:
        """Return the common leading task dimension of tensors, after checking them.

        Args:
            tensors: one per tensor of the packing, in order, (*shape) or (tasks, *shape); None is allowed.
            argument: their name, for messages.

        Returns:
            The number of tasks, or None if the tensors have no task dimension.

        Raises:
            ValueError: the list has another length, a shape does not fit, or task dimensions disagree.
            TypeError: an entry is not a tensor, or dtypes disagree.
        """
        if len(tensors) != len(self):
            expected = f"expected {len(self)} tensors, one per parameter: {self.described()}"
            raise ValueError(f"{argument}: {expected}; got {len(tensors)}")
        if self._usual(tensors):
            return len(tensors[0]) if tensors[0].dim() > len(self.shapes[0]) else None
        first: tuple[str, Tensor, int | None] | None = None
        for name, shape, tensor in zip(self.names, self.shapes, tensors):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{argument}[{name!r}]: expected a tensor or None, got {type(tensor).__name__}")
            check_dense(f"{argument}[{name!r}]", tensor)
            batched = tensor.dim() == len(shape) + 1
            if (tensor.shape[1:] if batched else tensor.shape) != shape:
                raise ValueError(
                    f"{argument}[{name!r}]: expected shape {tuple(shape)} or (tasks, *{tuple(shape)}), "
                    f"got {tuple(tensor.shape)}"
                )
            rows = tensor.shape[0] if batched else None
            if first is None:
                first = (name, tensor, rows)
                continue
            if rows != first[2]:
                raise ValueError(
                    f"{argument}[{name!r}]: expected the task dimension of {first[0]!r}, {first[2]}, got {rows}"
                )
            if tensor.dtype != first[1].dtype:
                raise TypeError(
                    f"{argument}[{name!r}]: expected {first[1].dtype} as {first[0]!r} has, got {tensor.dtype}"
                )
            if tensor.device != first[1].device:
                raise ValueError(f"{argument}[{name!r}]: expected device {first[1].device}, got {tensor.device}")
        return first[2] if first else None

    def _usual(self, tensors: Sequence[Tensor | None]) -> TypeGuard[Sequence[Tensor]]:
        """Whether all tensors are present and fit, in a dtype of the kernels: a fast check for the usual call."""
        if not isinstance(tensors, (list, tuple)) or not tensors or not ready(tensors):
            return False
        first, shapes = tensors[0], self.shapes
        if first.dim() == len(shapes[0]) + 1:
            shapes = tuple(first.shape[:1] + shape for shape in shapes)
        return all(tensor.shape == shape for tensor, shape in zip(tensors, shapes))

    def pack(self, tensors: Sequence[Tensor | None], argument: str = "tensors") -> Tensor:
        """Pack tensors into rows; None packs as zeros.

        Args:
            tensors: one per tensor of the packing, in order, (*shape) or (tasks, *shape).
            argument: their name, for messages.

        Returns:
            (tasks, numel), or (1, numel) without a task dimension.

        Raises:
            ValueError: as `tasks`, and if every entry is None.
            TypeError: as `tasks`.
        """
        rows = self.tasks(tensors, argument) if len(self) else None
        if all(tensor is None for tensor in tensors):
            raise ValueError(f"{argument}: expected at least one tensor that is not None")
        return self.join(tensors, rows)

    @own_code
    def join(self, tensors: Sequence[Tensor | None], rows: int | None) -> Tensor:
        """`pack` without its checks: tensors of `rows` tasks, or without a task dimension."""
        return self.joined(tensors, rows) if plain() else Pack.apply(self, rows, *tensors)

    def joined(self, tensors: Sequence[Tensor | None], rows: int | None) -> Tensor:
        """`join` in torch's own operations."""
        count = 1 if rows is None else rows
        like = next(tensor for tensor in tensors if tensor is not None)
        pieces = [
            like.new_zeros((count, size)) if tensor is None else tensor.reshape(count, size)
            for tensor, size in zip(tensors, self.sizes)
        ]
        return torch.cat(pieces, dim=1)

    @own_code
    def unpack(self, packed: Tensor, *, batched: bool = True) -> list[Tensor]:
        """The tensors of a packed (tasks, numel) tensor: (tasks, *shape) each, or shape each when not `batched`."""
        return self.pieces(packed, batched) if plain() else list(Unpack.apply(self, batched, packed))

    def pieces(self, packed: Tensor, batched: bool) -> list[Tensor]:
        """`unpack` in torch's own operations."""
        # One split, never slices: backward of a slice fills a full-size zero tensor for each.
        pieces = packed.split(self.sizes, dim=1)
        lead = (packed.shape[0],) if batched else ()
        return [piece.reshape(lead + view) for piece, view in zip(pieces, self._views)]

    def rows(self, packed: Tensor) -> list[list[Tensor]]:
        """The tensors of each task's row: the leaves with respect to which its loss is differentiated."""
        count = packed.shape[0]
        pieces = packed.reshape(-1).split(self.sizes * count)
        return [
            [piece.view(view) for piece, view in zip(pieces[i * len(self) : (i + 1) * len(self)], self._views)]
            for i in range(count)
        ]


# In torch the derivative of a concatenation is one slice per tensor, and the derivative of a slice is a full row of
# zeros around it: differentiating a derivative of packing would cost n rows for n tensors.
class Pack(Function):
    """Tensors, None for zeros, to one packed tensor; see `Packing.pack`. `Unpack` is its derivative and vice versa."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, rows: int | None, *tensors: Tensor | None) -> Tensor:
        """The packed tensor (rows, numel)."""
        ctx.set_materialize_grads(False)
        ctx.packing, ctx.batched = packing, rows is not None
        return packing.joined(tensors, rows)

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors."""
        if dpacked is None:
            return (None,) * (2 + len(ctx.packing))
        dtensors = ctx.packing.unpack(dpacked, batched=ctx.batched)
        return None, None, *map(pick, ctx.needs_input_grad[2:], dtensors)


class Unpack(Function):
    """One packed tensor to its tensors; see `Packing.unpack`."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, batched: bool, packed: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the packed rows."""
        ctx.set_materialize_grads(False)
        ctx.packing, ctx.rows = packing, len(packed) if batched else None
        return tuple(packing.pieces(packed, batched))

    @staticmethod
    def backward(ctx: Any, *dtensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the packed tensor."""
        if all(dtensor is None for dtensor in dtensors):
            return None, None, None
        return None, None, ctx.packing.join(dtensors, ctx.rows)
