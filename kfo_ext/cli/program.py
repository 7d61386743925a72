"""The program: its commands in the order of the help. Every expected error becomes one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated, Any

import typer

from kfo_ext.invoked import started
from kfo_ext.streams import ReaderGone, complain, echo, open_streams, said, settle
from kfo_ext.trainer.signals import Unsaid, of_several

from .checking import bench, doctor
from .options import Grouped
from .overview import plot, runs
from .scoring import compare, evaluate, export
from .training import demo, train

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(cls=Grouped)(train)
app.command("eval")(evaluate)
for _command in (compare, runs, plot, export, doctor, demo, bench):
    app.command()(_command)

# torch's messages when memory runs out; Python raises MemoryError.
NO_MEMORY = re.compile("(not enough|can't allocate|out of|no) memory|Storage size calculation overflowed|new thread")

# The exit code of a shell's tools when the reader of a pipe has gone, 128 + SIGPIPE.
UNREAD = 141


def _print_version(wanted: bool) -> None:
    if wanted:
        from kfo_ext.version import __version__

        echo(f"kfo {__version__}")
        raise typer.Exit


@app.callback()
def kfo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Meta-learning with Kronecker-factored updates."""


def main() -> None:
    """Run the command line, and turn every expected error into one line and exit code 2."""
    open_streams()
    started(sys.argv[0])
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="kfo", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _end(130, "aborted")
    except Unsaid:
        _end(2)
    except ReaderGone:
        _end(UNREAD)
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        _end(2, said(error))
    except SystemExit as ended:
        # The parser exits by itself after shell completion, or when the reader of its help has gone.
        _end(UNREAD if isinstance(ended.__context__, OSError) else int(ended.code or 0))
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            smaller = "--hidden, --layers, --hidden-layers, --meta-batch, --shots, --queries, --steps or --workers"
            _end(2, f"not enough memory for these options ({said(error)}): less of {smaller} needs less")
        # A usage error of typer's parser; its class moved between typer versions.
        if hasattr(error, "format_message"):
            _end(2, error.format_message() + _received(error))
        raise
    _end(code or 0, "aborted" if code == 130 else "")


def _received(error: Exception) -> str:
    """What a usage error leaves out: the value that typer's parser did not accept, which pydantic's error has."""
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    return f", got {found[0]['input']!r}" if found and "input" in found[0] else ""


def _end(code: int, message: str = "") -> None:
    if message:
        complain(f"kfo: {' '.join(message.split())}")
    settle()
    if of_several():
        # Skips Python's teardown, in which threads of a process group may abort; all output is already written.
        os._exit(code)
    sys.exit(code)
