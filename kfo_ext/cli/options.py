"""Options that several commands share, and the checks of option values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kfo_ext.choices import LARGEST_INTEGER
from kfo_ext.trainer.config import PARTS, TABLES
from kfo_ext.trainer.listing import listed
from kfo_ext.trainer.options import Option

# Options whose value is a path.
PATHS = ("data_root", "cache", "splits")
NO_DEFAULT: dict[str, Any] = {"show_default": False}


def number(help: str, *, least: int | None = None, most: int = LARGEST_INTEGER, **settings: Any) -> Any:
    """A typer option that takes a number, checked before any work begins; `most` bounds integers."""

    def check(value: float | None) -> float | None:
        if isinstance(value, float) and math.isnan(value):
            raise typer.BadParameter(f"expected a number, got {value}")
        if isinstance(value, int) and abs(value) > most:
            raise typer.BadParameter(f"expected at most {most}, got {value}")
        if value is not None and least is not None and value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}")
        return value

    return typer.Option(help=help, callback=check, **settings)


def completed(values: list[str]) -> Any:
    """A shell completion for an option with a fixed set of values."""

    def offered(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return offered


Split = Annotated[
    str,
    typer.Option(
        help="classes to take tasks from: train, validation or test",
        autocompletion=completed(["train", "validation", "test"]),
    ),
]
Checkpoint = Annotated[
    str, typer.Option(help="best (by validation) or last", autocompletion=completed(["best", "last"]))
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document; messages go to stderr")]
Run = Annotated[Path, typer.Argument(help="run folder")]
# Settings in which an evaluation may differ from its run; each combination has its own score file.
Steps = Annotated[int | None, number("inner steps, 0 for none, instead of the run's", least=0, **NO_DEFAULT)]
Shots = Annotated[int | None, number("support examples of a class instead of the run's", least=1, **NO_DEFAULT)]
Queries = Annotated[int | None, number("query examples of a class instead of the run's", least=1, **NO_DEFAULT)]
Ways = Annotated[
    int | None,
    number("classes of a task instead of the run's, if the network fits any number", least=2, **NO_DEFAULT),
]
Precision = Annotated[str | None, typer.Option(help="instead of the run's", **NO_DEFAULT)]


class Grouped(TyperCommand):
    """A command whose help lists its options under the headings of their panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options group by group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option per configuration entry to a command; `given` receives those that are on the command line."""
    options = []
    for name, group, option, help in listed():
        kind: Any = Path if name in PATHS else option.kind
        about = typer.Option(help=help, rich_help_panel=group, autocompletion=_offered(name, option), **NO_DEFAULT)
        annotation = Annotated[kind | None, about]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    names = [option.name for option in options]

    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in names}
        given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
        command(given=given, **arguments)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "given"] + options
    # typer reads this signature instead of the function's own.
    vars(wrapped)["__signature__"] = inspect.Signature(parameters)
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _offered(name: str, option: Option) -> Any:
    values = [*(TABLES[name] if name in PARTS else option.choices)]
    return completed(values) if values else None


def given(**options: Any) -> dict[str, Any]:
    """The options that were on the command line, by name."""
    return {name: value for name, value in options.items() if value is not None}


def several(text: str | None) -> tuple[str, ...] | None:
    """Split a comma-separated text into its items; None stays None."""
    return None if text is None else tuple(item.strip() for item in text.split(","))


def counts(option: str, text: str | None) -> tuple[int, ...] | None:
    """Parse comma-separated positive integers.

    Args:
        option: name of the option, for messages.
        text: the option's value, None if it is not on the command line.

    Returns:
        The integers, or None if `text` is None.

    Raises:
        ValueError: an item is not a positive integer, or is too large.
    """
    items = several(text)
    if items is None:
        return None
    if not all(item.isdecimal() and 0 < int(item) <= LARGEST_INTEGER for item in items):
        raise ValueError(f"{option}: expected positive integers with commas between them, got {text!r}")
    return tuple(map(int, items))


def new_folder(name: str) -> Path:
    """The path runs/NAME-TIME."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
