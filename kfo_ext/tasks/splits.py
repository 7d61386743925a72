"""The classes of train, validation and test: read from files, and checked against the data set."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from kfo_ext.tasks.checks import SPLITS
from kfo_ext.tasks.sources import Source

# Other names of the validation split's files and folders.
ALIASES = {"val": "validation", "valid": "validation"}
# The usual stems of the splits' files.
STEMS = {"train": "train", "validation": "val", "test": "test"}
# The number of wrong names that a message lists.
SHOWN = 5

Classes = Mapping[str, Sequence[str]]


def split_named(name: str) -> str | None:
    """The split that a file's stem or a folder names, or None."""
    split = ALIASES.get(name, name)
    return split if split in SPLITS else None


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read the classes of each split.

    Args:
        path: a JSON file {"train": [...], "val": [...], "test": [...]}, or a folder with train.txt, val.txt and
            test.txt, one class per line.

    Returns:
        The classes of each split.

    Raises:
        FileNotFoundError: a file, which is named, does not exist.
        ValueError: a file, which is named, cannot be read.
    """
    if path.is_dir():
        return {split: _lines(path / f"{stem}.txt") for split, stem in STEMS.items()}
    if not path.is_file():
        raise FileNotFoundError(f"splits: {path} is neither a JSON file nor a folder with train.txt, val.txt, test.txt")
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"splits: {path} is no JSON ({error})") from error
    named = {split_named(name): value for name, value in values.items()} if isinstance(values, dict) else {}
    if set(named) != set(SPLITS) or len(values) != len(SPLITS) or not all(map(_is_list_of_text, named.values())):
        raise ValueError(f'splits: {path}: expected {{"train": [...], "val": [...], "test": [...]}} of class names')
    return {split: named[split] for split in SPLITS}


def check_splits(classes: Classes, where: str) -> None:
    """Raise ValueError for a split that is empty, names a class twice, or shares one with another split."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        if not classes.get(split):
            raise ValueError(f"{where}: expected classes in each of {', '.join(SPLITS)}, got none in {split}")
        for name in classes[split]:
            if name in seen:
                both = f"twice in {split}" if seen[name] == split else f"in {seen[name]} and in {split}"
                raise ValueError(
                    f"{where}: class {name!r} is {both}; few-shot splits hold different classes, not different images"
                )
            seen[name] = split


def check_members(classes: Classes, present: Collection[str], where: str) -> None:
    """Raise ValueError if a split names classes that are not there."""
    missing = [name for split in SPLITS for name in classes[split] if name not in present]
    if missing:
        shown = ", ".join(map(repr, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(
            f"{where}: {len(missing)} of the splits' classes have no image there: {shown}; is it another data set?"
        )


def lines_of(text: str) -> list[str]:
    """The stripped lines of a text that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def split_files(source: Source, suffix: str) -> dict[str, str] | None:
    """Find a source's files train, val and test, which lie in one folder.

    Args:
        source: the source.
        suffix: the suffix of the files.

    Returns:
        The name of each split's file, or None if there is no file for train.

    Raises:
        ValueError: several folders have them, or a file is missing.
    """
    folders = sorted(name.removesuffix(f"train{suffix}") for name in source.names if _is_file(name, f"train{suffix}"))
    if not folders:
        return None
    if len(folders) > 1:
        raise ValueError(f"root: {source.path} holds several files train{suffix}: in {', '.join(folders[:SHOWN])}")
    found = {split: f"{folders[0]}{stem}{suffix}" for split, stem in STEMS.items()}
    missing = [name for name in found.values() if name not in source.names]
    if missing:
        raise ValueError(f"root: {source.path} has train{suffix}, and no {' and no '.join(missing)}")
    return found


def _is_file(name: str, file: str) -> bool:
    return name.rsplit("/", 1)[-1] == file


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _lines(path: Path) -> list[str]:
    try:
        return lines_of(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"splits: {path.parent} has no {path.name}, with one class per line") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"splits: {path} cannot be read ({error})") from error
