"""Tables, pictures and numbers as Markdown. Accuracies are in %, differences in percentage points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = ""
# Of the pictures, beside the page.
FOLDER = "paper"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right; nothing without a body."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    if len(lines) == 2:
        return ""
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def percent(value: float | None, sign: bool = False) -> str:
    """A share in %; nothing for None."""
    return NONE if value is None else f"{100 * value:{'+' if sign else ''}.2f}"


def half(value: float | None) -> str:
    """Half an interval, in %; nothing for None."""
    return NONE if value is None else f"± {100 * value:.2f}"


def picture(name: str, caption: str) -> str:
    """A picture of `FOLDER` by the name of its file, and its caption below."""
    return f"![{caption}]({FOLDER}/{name})\n\n*{caption}*"
