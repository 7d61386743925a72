"""The options as the command line lists them: one per name, with all its owners. No torch."""

from __future__ import annotations

from typing import NamedTuple

from .config import NOUNS, PARTS, RUN, TABLES, owners
from .options import Option


class Listed(NamedTuple):
    """An option of the command line.

    Attributes:
        name: its name.
        group: the heading it is listed under.
        option: as in the first part that has it.
        help: its text with its owners, its choices and its defaults.
    """

    name: str
    group: str
    option: Option
    help: str


def listed() -> list[Listed]:
    """Every option, group by group."""
    rows = [_listed("Parts", name, option) for name, option in PARTS.items()]
    for kind, table in TABLES.items():
        names = dict.fromkeys(name for part in table.values() for name in part.options)
        rows += [_of_parts(kind, name, owners(name)[kind]) for name in names]
    return [*rows, *(_listed("Training", name, option) for name, option in RUN.items())]


def _listed(group: str, name: str, option: Option) -> Listed:
    choices = option.choices
    if name in TABLES:
        described = [f"{row} ({part.help})" for row, part in TABLES[name].items()]
        return Listed(name, group, option, f"{option.help}: {', '.join(described)}  [default: {option.shown_default}]")
    taken = f" ({' | '.join(choices)})" if choices else ""
    others = "".join(
        f"; {row}: {part.defaults[name]}"
        for table in TABLES.values()
        for row, part in table.items()
        if name in part.defaults
    )
    return Listed(name, group, option, f"{option.help}{taken}  [default: {option.shown_default}{others}]")


def _of_parts(kind: str, name: str, rows: dict[str, Option]) -> Listed:
    # Parts with an identical option share its text.
    texts: dict[str, list[str]] = {}
    for row, option in rows.items():
        texts.setdefault(_listed("", name, option).help, []).append(row)
    help = "; ".join(f"{', '.join(owning)}: {text}" for text, owning in texts.items())
    return Listed(name, f"Options of the {NOUNS[kind]}", next(iter(rows.values())), help)
