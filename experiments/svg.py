"""Pictures as SVG: the same to the byte with the same matplotlib, whose version the file names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

GRID = {"axes.grid": True, "grid.alpha": 0.3}


@contextmanager
def styled(**settings: Any) -> Iterator[None]:
    """Within it figures are made and written; the reader's own settings do not count.

    settings: of matplotlib's rcParams, dots included: styled(**GRID).
    """
    from matplotlib import style

    # Identifiers follow from the salt, and texts stay texts.
    with style.context(["default", {"svg.hashsalt": "kfo", "svg.fonttype": "none", **settings}]):
        yield


def svg(figure: Any) -> bytes:
    """The file of a figure, without a date; to be called within `styled`."""
    whole = BytesIO()
    figure.savefig(whole, format="svg", metadata={"Date": None})
    return whole.getvalue()
