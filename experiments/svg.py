"""Pictures as SVG: the same bytes on every machine with the same version of matplotlib, which the file names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

# Matplotlib names clip paths and markers by hashes of coordinates, whose last bits depend on the processor.
HASHED = re.compile(rb'(?<=["#])[a-z][0-9a-f]{10}\b')
GRID = {"axes.grid": True, "grid.alpha": 0.3}


@contextmanager
def styled(**settings: Any) -> Iterator[None]:
    """Make and write figures in the block, independently of the user's own settings.

    Args:
        **settings: matplotlib's rcParams, whose names have dots: styled(**GRID).

    Yields:
        Nothing; the style holds in the block.
    """
    from matplotlib import style

    # The salt determines identifiers; texts are stored as text.
    with style.context(["default", {"svg.hashsalt": "kfo", "svg.fonttype": "none", **settings}]):
        yield


def svg(figure: Any) -> bytes:
    """The file of a figure, without a date, its parts named by their order; call it within `styled`."""
    whole = BytesIO()
    figure.savefig(whole, format="svg", metadata={"Date": None})
    numbers: dict[bytes, bytes] = {}
    return HASHED.sub(lambda found: numbers.setdefault(found[0], b"part-%d" % len(numbers)), whole.getvalue())
