"""Pictures as SVG: the same bytes with the same version of matplotlib, which the file names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

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
    """The file of a figure, without a date; call it within `styled`."""
    whole = BytesIO()
    figure.savefig(whole, format="svg", metadata={"Date": None})
    return whole.getvalue()
