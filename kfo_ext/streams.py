"""The standard streams of a command, which may be closed, full or broken, and take names that do not decode."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from contextlib import suppress
from typing import Any, TextIO

# Where in its own sources an error of torch was.
_TORCH_PLACE = re.compile(r"^\[enforce fail at [^]]*\] [^.]*\. ")


class ReaderGone(Exception):
    """Nobody reads the standard output any more, as after `| head`: the command ends without a message."""


def open_streams() -> None:
    """Make the standard streams take whatever is printed.

    The number of a closed one would go to the next file opened, which would then take what is meant for the stream.
    """
    for number in range(3):
        if not _is_open(number):
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def echo(text: str) -> None:
    """Print one line and flush it.

    Args:
        text: the line.

    Raises:
        ReaderGone: the standard output is a pipe that nobody reads.
        OSError: the standard output cannot be written; the message names it.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise OSError(f"standard output: {error.strerror}") from None


def document(content: Any) -> None:
    """Print JSON.

    Raises: ReaderGone and OSError as `echo`, ValueError for a number that is not finite.
    """
    echo(json.dumps(content, indent=2, allow_nan=False))


def complain(text: str) -> None:
    """Print one line on the standard error, if it can take it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    # An OSError has its number and a file's name in its text; without a file its reason alone says more.
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return _TORCH_PLACE.sub("", lines[0]) if isinstance(error, RuntimeError) else " ".join(lines)


def settle() -> None:
    """Empty the streams, into nothing where they fail: what Python cannot write when it ends is a second error."""
    for stream in (sys.stdout, sys.stderr):
        _settle(stream)


def _settle(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
