"""Options of a run from a file: TOML, or the config.json of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfo_ext.runs.files import read_json

from .config import Config, joined

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_options(path: Path) -> dict[str, Any]:
    """Read the options in a file.

    Args:
        path: a JSON file (by its suffix), else TOML; or a run folder, whose config.json is read.

    Returns:
        The options by name.

    Raises:
        ValueError: the file cannot be read or is not a table of options; the message names it.
    """
    if path.is_dir():
        path /= "config.json"
    options = read_json(path) if path.suffix == ".json" else _read_toml(path)
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected a table of options, got {type(options).__name__}")
    return options


def configured(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the options of a file with given ones, which take precedence.

    Args:
        path: the file, as for `read_options`.
        given: options by name; with another part, the file's options of the old part are dropped.

    Returns:
        The options as `Config` takes them.

    Raises:
        ValueError: an option is unknown or a value is not possible; the message names the file if the option is from
            it.
        TypeError: a given value has another type.
    """
    options = read_options(path)
    try:
        values = joined(options, given)
        Config(**values)
    except (TypeError, ValueError) as error:
        name = str(error).partition(":")[0]
        # Otherwise the wrong option is from the command line, or given by neither.
        if name not in given and (name in options or name.startswith("unknown")):
            raise ValueError(f"{path}: {error}") from None
        raise
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable TOML file ({error})") from None
