"""Writes reference/command-line.md: every command of `kfo` with its arguments and options.

python docs/make_command_line.py
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from kfo_ext.cli import app

PAGE = Path(__file__).parent / "reference" / "command-line.md"
# What a help text calls a value.
VALUES = {int: "INTEGER", str: "TEXT"}
HEAD = """# Command line

`kfo COMMAND --help` prints the same. An error is one line on stderr and exit code 2; `kfo doctor` and `kfo bench` exit
with code 1 if a backend computes wrong numbers; Ctrl-C gives code 130, except in `kfo train`, which saves and exits
with 0. `python -m kfo_ext` is the same command.

`kfo train` has an option for everything in a run's `config.json`: `--meta-lr` is `meta_lr` there. An option that has no
effect with the chosen parts is refused. `python docs/make_command_line.py` writes this page.

`kfo --version` prints the version. `kfo --install-completion` makes the shell complete commands, options and their
values.
"""


def _cell(text: str) -> str:
    """Text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(heading: str, records: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"| `{_cell(name)}` | {_cell(text)} |\n" for name, text in records)
    return f"| {heading} | |\n|---|---|\n{rows}"


def _kind(hint: Any) -> type:
    """The type of a value, of a hint such as int | None."""
    return next(kind for kind in (*get_args(hint), hint) if kind is not type(None))


def _option(parameter: inspect.Parameter, kind: type, option: OptionInfo) -> tuple[str, str]:
    """An option's names and its help, with the default where the help does not say it."""
    name = parameter.name.replace("_", "-")
    # Within Annotated, the first name that is given stands as the default.
    given = [text for text in (option.default, *(option.param_decls or ())) if str(text).startswith("--")]
    names = " / ".join(given or ([f"--{name}", f"--no-{name}"] if kind is bool else [f"--{name}"]))
    default = ""
    if parameter.default is inspect.Parameter.empty:
        default = "  [required]"
    elif option.show_default and parameter.default not in (None, "", False):
        default = f"  [default: {parameter.default}]"
    return names if kind is bool else f"{names} {VALUES.get(kind, kind.__name__.upper())}", f"{option.help}{default}"


def _described(name: str, command: Callable[..., Any]) -> str:
    """A command's synopsis, its help, its arguments and its options, group by group."""
    arguments: list[tuple[str, str]] = []
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        hint, about = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else (str, None)
        if isinstance(about, OptionInfo):
            group = groups.setdefault(about.rich_help_panel or "Options", [])
            group.append(_option(parameter, _kind(hint), about))
        elif isinstance(about, ArgumentInfo):
            name_shown = str(about.metavar or parameter.name.upper())
            optional = parameter.default is not inspect.Parameter.empty
            default = f"  [default: {parameter.default}]" if optional else ""
            arguments.append((f"[{name_shown}]" if optional else name_shown, f"{about.help}{default}"))
    usage = " ".join([name, *(argument for argument, _ in arguments), *(["[OPTIONS]"] if groups else [])])
    parts = [f"    kfo {usage}\n", f"{inspect.getdoc(command)}\n"]
    parts += [_table("Arguments", arguments)] if arguments else []
    parts += [_table(group, records) for group, records in groups.items()]
    return "\n".join(parts)


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for command in app.registered_commands:
        function = cast("Callable[..., Any]", command.callback)
        name = command.name or function.__name__
        parts.append(f"## kfo {name}\n\n{_described(name, function)}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
