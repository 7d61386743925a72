"""Reads plain values and byte arrays out of a pickle without running it.

A pickle is a program: unpickling calls what it names. This reader calls nothing. It decodes the opcodes, builds
dictionaries, lists, tuples, numbers and strings itself, and records what a pickle would import or call. `array_of` then
reads an array's shape and bytes from the records that numpy writes. Opcodes that plain data do not need are refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

# numpy's names in the pickles of its versions.
RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
DTYPE = "numpy dtype"


class Name(NamedTuple):
    """A record of an import, "module name"."""

    name: str


class Call:
    """A record of a call: the function, its arguments, and the state to be set.

    Args:
        name: the function.
        arguments: its arguments.
    """

    def __init__(self, name: Any, arguments: Any) -> None:
        self.name, self.arguments, self.state = name, arguments, None


class Bytes(NamedTuple):
    """The shape and the content of an array of bytes."""

    shape: tuple[int, ...]
    content: bytes


def read_pickle(content: bytes, source: str) -> Any:
    """Read the value of a pickle; a string of Python 2 becomes a str with one character per byte.

    Args:
        content: the pickle.
        source: the name of the file, for messages.

    Returns:
        The value; imports and calls in it are records.

    Raises:
        ValueError: the file is no pickle, is truncated, or needs more than plain data.
    """
    try:
        return _Machine().run(content)
    # A damaged pickle reads missing values, or values of a type without the operation.
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is damaged or no pickle of plain data ({error})") from error


def array_of(value: Any, source: str) -> Bytes:
    """Read the array of bytes from a record.

    Args:
        value: the record.
        source: the name of the file, for messages.

    Returns:
        The array's shape and content.

    Raises:
        ValueError: the record is no C-ordered numpy array of uint8.
    """
    try:
        _, shape, dtype, fortran, content = value.state
        is_array = value.name.name in RECONSTRUCT and dtype.name.name == DTYPE and dtype.arguments[0] == "u1"
        plain = content.encode("latin-1") if isinstance(content, str) else bytes(content)
        if not is_array or fortran or not all(isinstance(side, int) for side in shape):
            raise ValueError("another type, or another order")
        if math.prod(shape) != len(plain):
            raise ValueError(f"{len(plain)} bytes for {shape}")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: expected a numpy array of uint8 in C order ({error})") from error
    return Bytes(tuple(shape), plain)


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        """The value of a pickle; raises ValueError for an opcode that is refused."""
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                (value,) = self.stack
                return value
            if opcode.name in PUSHES:
                self.stack.append(argument)
            elif opcode.name in STEPS:
                STEPS[opcode.name](self, argument)
            else:
                raise ValueError(f"opcode {opcode.name}")
        raise ValueError("it has no end")

    def since_mark(self) -> list[Any]:
        """Pop all values since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        """Pop the last `count` values."""
        if len(self.stack) < count:
            raise ValueError("a value is missing")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def top(self, kind: type) -> Any:
        """The last value; raises ValueError unless it is of this type."""
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"expected a {kind.__name__}, got {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def call(self) -> None:
        """Replace a function and its arguments by the record of the call."""
        name, arguments = self.last(2)
        self.stack.append(Call(name, arguments))

    def build(self) -> None:
        """Move a state to the record of the call before it."""
        (state,) = self.last(1)
        self.top(Call).state = state

    def name(self) -> None:
        """Replace a module and a name by the record of the import."""
        module, name = self.last(2)
        self.stack.append(Name(f"{module} {name}"))

    def put(self, key: int) -> None:
        """Store the last value in the memo."""
        self.memo[key] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        """Append items to the last value, a list."""
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, in turn, in the last value, a dictionary."""
        # Hashing nested tuples may take exponential time.
        if not all(isinstance(key, (str, bytes, int)) for key in items[::2]):
            raise ValueError("expected keys that are text or numbers")
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))

    def make_dict(self) -> None:
        """Replace keys and values since the last mark by a dictionary."""
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)


# Opcodes whose argument is the value.
PUSHES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "DICT": lambda m, _: m.make_dict(),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.last(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.last(3))),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(m.last(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "PUT": lambda m, key: m.put(int(key)),
    "BINPUT": lambda m, key: m.put(key),
    "LONG_BINPUT": lambda m, key: m.put(key),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GET": lambda m, key: m.stack.append(m.memo[int(key)]),
    "BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "LONG_BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "GLOBAL": lambda m, name: m.stack.append(Name(name)),
    "STACK_GLOBAL": lambda m, _: m.name(),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
}
