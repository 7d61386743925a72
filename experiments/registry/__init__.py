"""All entries, in the order in which they are computed."""

from __future__ import annotations

from difflib import get_close_matches

from ..entry import Entry
from . import anil, beyond, cifar, depth, floors, linear, omniglot, synthetic

ENTRIES: dict[str, Entry] = {}
for _entry in (
    *synthetic.ENTRIES,
    *omniglot.ENTRIES,
    *anil.ENTRIES,
    *linear.ENTRIES,
    *floors.ENTRIES,
    *depth.ENTRIES,
    *cifar.ENTRIES,
    *beyond.ENTRIES,
):
    if _entry.name in ENTRIES:
        raise ValueError(f"{_entry.name}: two entries have this name")
    ENTRIES[_entry.name] = _entry


def chosen(names: list[str]) -> list[Entry]:
    """The entries of these names, or of groups; all of them where no name is given.

    Raises:
        ValueError: an unknown name; says the nearest ones.
    """
    groups = {entry.group for entry in ENTRIES.values()}
    for name in names:
        if name not in ENTRIES and name not in groups:
            near = get_close_matches(name, [*ENTRIES, *groups], n=3, cutoff=0.4)
            hint = f"; the nearest are {', '.join(near)}" if near else "; `python -m experiments list` shows them"
            raise ValueError(f"name: expected an entry or a group of entries, got {name!r}{hint}")
    return [entry for entry in ENTRIES.values() if not names or entry.name in names or entry.group in names]
