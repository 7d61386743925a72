"""The report: `docs/paper.md` and its pictures, from the registry and the result files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kfo_ext.runs.files import atomic_write

from ..markdown import FOLDER
from ..registry import ENTRIES
from ..registry.claims import CLAIMS
from ..registry.groups import COLLAPSE, GROUPS, HEADLINE
from ..store import RESULTS
from .outcomes import Book
from .text import page

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
# Longer runs are not part of the repository.
BUDGET = "cpu"


def files(path: Path = PAGE, results: Path = RESULTS) -> dict[Path, bytes]:
    """Make the content of the page and of its pictures.

    Args:
        path: path of the page; links and pictures are relative to it.
        results: folder of the result files.

    Returns:
        The content of each file.

    Raises:
        ValueError: the group of an entry has no section, or a result file is damaged.
    """
    book = Book.read(ENTRIES, BUDGET, results)
    made = page(book, path, groups=GROUPS, claims=CLAIMS, headline=HEADLINE, collapse=COLLAPSE)
    drawn = {path.parent / FOLDER / name: picture for name, picture in made.pictures.items()}
    return {path: made.text().encode(), **drawn}


def write(path: Path = PAGE, results: Path = RESULTS) -> Mapping[Path, bytes]:
    """Write the page and its pictures, remove other pictures, and return the content of each file."""
    found = files(path, results)
    folder = path.parent / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in found.items():
        with atomic_write(file) as whole:
            whole.write(content)
    for file in folder.glob("*.svg"):
        if file not in found:
            file.unlink()
    return found
