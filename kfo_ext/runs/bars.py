"""Progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(*arguments: Any, shown: bool = True, **options: Any) -> tqdm:
    """A bar of tqdm: a widget in a notebook, text where stderr is a terminal, and nothing elsewhere.

    arguments, options: as tqdm's.
    shown: false shows nothing anywhere.
    """
    # Not on top: tqdm chooses when it is imported, which may come before the notebook.
    from tqdm.auto import tqdm

    # A notebook's output is no terminal, of which alone tqdm thinks.
    widget = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return tqdm(*arguments, disable=(False if widget else None) if shown else True, **options)
