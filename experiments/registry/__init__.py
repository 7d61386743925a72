"""All entries, in the order of computation."""

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
    """Select the entries of these names or groups; all of them if no name is given.

    Args:
        names: of entries or groups.

    Returns:
        The entries, in the order of computation.

    Raises:
        ValueError: a name is unknown; the message lists the nearest ones.
    """
    groups = {entry.group for entry in ENTRIES.values()}
    for name in names:
        if name not in ENTRIES and name not in groups:
            near = get_close_matches(name, [*ENTRIES, *groups], n=3, cutoff=0.4)
            hint = f"; the nearest are {', '.join(near)}" if near else "; `python -m experiments list` shows them"
            raise ValueError(f"name: expected an entry or a group of entries, got {name!r}{hint}")
    return [entry for entry in ENTRIES.values() if not names or entry.name in names or entry.group in names]
