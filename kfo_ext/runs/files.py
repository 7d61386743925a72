"""Files that are replaced atomically, JSON files, and new folders."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

_TOKEN = 8


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` only if the block ends without an error.

    The content goes to `.NAME.TOKEN.partial` first. The token is random: writers of one file never share it.

    Args:
        path: the file to write or replace; its folder must exist.

    Yields:
        The open file.

    Raises:
        OSError: the file cannot be written; the message names `path`.
    """  # noqa: DOC501  `unwritable` makes an OSError; others are the block's
    partial = path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: OSError) -> OSError:
    """The error to raise for a failed write; the system's own error names no file when a disk is full."""
    return OSError(f"{path}: cannot be written ({error.strerror or error})")


def partials(paths: Iterable[Path]) -> list[Path]:
    """Unfinished writes to these files, of writers that are running or were killed."""
    token = "[0-9a-f]" * (2 * _TOKEN)
    return [partial for path in paths for partial in path.parent.glob(f".{path.name}.{token}.partial")]


def new_folder(path: Path) -> Path:
    """Make a folder that did not exist: `path`, or the first possible one of path-2, path-3, ...

    If several processes use the same path, each gets its own folder.

    Args:
        path: the preferred path.

    Returns:
        The folder's path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically.

    Args:
        path: the file to write or replace.
        content: anything that JSON can hold.

    Raises:
        ValueError: a number is not finite; the message names the file.
        OSError: the file cannot be written; the message names it.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Args:
        path: the file to read.

    Returns:
        Its content.

    Raises:
        ValueError: the file is absent or is not JSON; the message names it.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None


def parse_json(text: str) -> Any:
    """Parse standard JSON, without NaN and Infinity, which Python's parser accepts.

    Args:
        text: the JSON text.

    Returns:
        Its content.

    Raises:
        ValueError: the text is anything else, or is nested too deeply to parse.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; a boolean is not."""
    # A comparison, not a conversion: an integer may be too large for a float.
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_count(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least`; a boolean is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk, or a power cut may bring the old name back without the old content.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
