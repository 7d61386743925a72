"""The program that a shell started in this process, for messages that name the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

_program = "kfo"


def program() -> str:
    """What comes before the name of a command: kfo, or `python SCRIPT` in a script that calls `kfo_ext.cli.main`."""
    return _program


def started(argv0: str) -> None:
    """Tell `program` the first word of this process, sys.argv[0]."""
    global _program
    path = Path(argv0)
    if path.parts[-2:] == ("kfo_ext", "__main__.py"):
        _program = "python -m kfo_ext"
    else:
        _program = f"python {shlex.quote(argv0)}" if path.suffix == ".py" else "kfo"
