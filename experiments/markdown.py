"""Tables, pictures and numbers as Markdown. Accuracies are in %, differences in percentage points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NONE = ""
# The folder of the pictures, beside the page.
FOLDER = "paper"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table with the first column aligned left, the others right; "" without a body."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    if len(lines) == 2:
        return ""
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def percent(value: float | None, sign: bool = False) -> str:
    """A fraction in %; "" for None."""
    return NONE if value is None else f"{100 * value:{'+' if sign else ''}.2f}"


def half(value: float | None) -> str:
    """Half an interval, in %; "" for None."""
    return NONE if value is None else f"± {100 * value:.2f}"


def picture(name: str, caption: str) -> str:
    """A picture of `FOLDER` by the name of its file, and its caption below."""
    return f"![{caption}]({FOLDER}/{name})\n\n*{caption}*"
