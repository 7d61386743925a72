"""The output of `kfo bench`: a table, results.csv and results.json."""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from kfo_ext.bench.measure import TOO_SLOW
from kfo_ext.bench.result import write_rows
from kfo_ext.bench.rows import COLUMNS, Row, fails, loses
from kfo_ext.runs.files import atomic_write, read_json

# The value of the first key of a results.json, which identifies the format.
FORMAT = "kfo bench 2"
WIDTH = 100
HEAD = (
    f"{'provider':26} {'median':>8} {'spread':>6} {'GB/s':>6} {'GFLOP/s':>7} {'of floor':>8} {'memory':>8}"
    f" {'error':>6}  speed-up"
)
LEGEND = (
    "* ours; + reads intermediates that an order before it saved: less work and more memory than is counted here; "
    "spread: from the 20th to the 80th percentile, in % of the median; speed-up: time of the fastest other / of this"
)


def wrapped(text: str) -> list[str]:
    """Lines of at most WIDTH characters, if no word is longer."""
    whole = len(text) <= WIDTH
    return (
        [text]
        if whole
        else textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    )


def seconds_text(seconds: float) -> str:
    """A text such as `12.3 us`."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(count: int | None) -> str:
    """A text such as `1.2 MB`; '' for None."""
    if count is None:
        return ""
    if count >= 9.995e8:
        return f"{count / 1e9:.3g} GB"
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def _rate_text(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:.3g}" if rate < 999.5 else f"{rate:.0f}"


def line(row: Row, note: str = "") -> str:
    """Format one row of the table; `+` marks reads of saved intermediates, LOSES a row of kfo_ext that another beats.

    Args:
        row: the row.
        note: the last column of a row that is compared with nothing.

    Returns:
        The line.
    """
    name = f"{'* ' if row['ours'] else '  '}{row['provider']}{' +' if row['saved'] else ''}"
    if row["status"] != "ok":
        return f"{name:26} {row['status']}"
    spread = f"{100 * (row['high_s'] - row['low_s']) / row['median_s']:.0f} %"
    share = "" if row["floor_share"] is None else f"{row['floor_share']:.3f}"
    if row["best_other"]:
        note = f"{row['other_over_this']:.2f}x{' LOSES' if loses(row) else ''}"
    rates = f"{_rate_text(row['gb_per_s']):>6} {_rate_text(row['gflop_per_s']):>7}"
    text = (
        f"{name:26} {seconds_text(row['median_s']):>8} {spread:>6} {rates} {share:>8}"
        f" {bytes_text(row['peak_bytes']):>8} {row['error']:6.0e}  {note}"
    )
    return text.rstrip()


def table(rows: Sequence[Row]) -> Iterable[str]:
    """The lines of a table of one point: a head for each order and mode."""
    heading = None
    fastest = {(row["order"], row["mode"], row["best_other"]) for row in rows if row["best_other"]}
    for row in rows:
        mode = "" if row["mode"] == "eager" else f", {row['mode']}"
        now = f"{row['axis']}={row['x']}  {row['group']}, {row['tasks']} tasks: {row['order']}{mode}"
        if now != heading:
            yield ""
            yield now
            yield HEAD
            heading = now
        yield line(row, "fastest other" if (row["order"], row["mode"], row["provider"]) in fastest else "")


def fit_table(fits: Sequence[Row]) -> Iterable[str]:
    """The exponents, one line for each axis, group and order."""
    lines: dict[str, list[str]] = {}
    for fit in fits:
        mode = "" if fit["mode"] == "eager" else f", {fit['mode']}"
        key = f"{fit['axis']} {fit['from']}..{fit['to']}, {fit['group']}, {fit['order']}{mode}"
        lines.setdefault(key, []).append(f"{fit['provider']} {fit['exponent']:.2f}")
    if lines:
        yield ""
        yield "time ~ size^e, least squares over the upper half of each axis:"
        yield from (f"  {key}: {', '.join(values)}" for key, values in lines.items())


def losses(rows: Sequence[Row]) -> Iterable[str]:
    """Describe how often each provider of kfo_ext is beaten, where most, and how often by one that read intermediates.

    Args:
        rows: each measurement once, even if it lies on several axes.

    Yields:
        A line per provider.
    """
    for name in dict.fromkeys(row["provider"] for row in rows if row["ours"] and row["best_other"]):
        ours = [row for row in rows if row["provider"] == name and row["best_other"]]
        lost = [row for row in ours if loses(row)]
        text = f"{name}: faster than every other in {len(ours) - len(lost)} of {len(ours)}"
        if lost:
            worst = min(lost, key=lambda row: row["other_over_this"])
            text += (
                f"; loses most at {_place(worst)} {worst['order']}, "
                f"{worst['other_over_this']:.2f}x of {worst['best_other']}"
            )
        if saved := sum(bool(row["other_saved"]) for row in lost):
            text += f"; in {saved} of the {len(lost)} to one that reads saved intermediates (+)"
        yield text


def summary(rows: Sequence[Row]) -> str:
    """State in one sentence whether kfo_ext is correct, and how much faster than the fastest other provider.

    Args:
        rows: as `losses` takes them.

    Returns:
        The sentence.
    """
    if wrong := [row for row in rows if fails(row)]:
        names = ", ".join(dict.fromkeys(row["provider"] for row in wrong))
        return f"Of ours, {names} failed or gave wrong numbers in {len(wrong)} cases, which are listed above."
    ours = [row for row in rows if row["ours"] and row["best_other"]]
    if not ours:
        return "Nothing was compared: no order was measured of both ours and another provider."
    name = ours[0]["provider"]
    cases = [row for row in ours if row["provider"] == name]
    ratios = [row["other_over_this"] for row in cases]
    least = min(cases, key=lambda row: row["other_over_this"])
    return (
        f"{name} is faster than every other provider in {sum(not loses(row) for row in cases)} of {len(cases)} cases, "
        f"by a factor of {statistics.median(ratios):.3g} in the median, {max(ratios):.3g} at best, and "
        f"{min(ratios):.3g} at worst ({_place(least)} {least['order']}, against {least['best_other']})."
    )


def worst(rows: Sequence[Row]) -> Row | None:
    """The native row of kfo_ext that is furthest from the floor, by graph replay if that was measured."""
    ours = [row for row in rows if row["provider"] == "native" and row["floor_share"] is not None]
    replayed = [row for row in ours if row["mode"] == "graph"]
    return min(replayed or ours, key=lambda row: row["floor_share"], default=None)


def left_out(rows: Sequence[Row]) -> Iterable[str]:
    """Describe what was not measured for lack of time: whole points and single providers, how many and which.

    Args:
        rows: as `losses` takes them.

    Yields:
        A line for the points, and one for each provider.
    """
    points = [_place(row) for row in rows if row["provider"] is None and row["status"] != "ok"]
    if points:
        yield f"left out, {len(points)} points after the limit: {', '.join(dict.fromkeys(points))}"
    slow = [row for row in rows if str(row["status"]).startswith(TOO_SLOW)]
    for name in dict.fromkeys(row["provider"] for row in slow):
        where = [f"{_place(row)} {row['order']}" for row in slow if row["provider"] == name]
        yield f"left out, {name}, {len(where)} times too slow for the budget: {', '.join(where)}"


def _place(row: Row) -> str:
    return f"{row['axis']}={row['x']} {row['group']}"


def write(folder: Path, rows: Sequence[Row], facts: Row) -> Row:
    """Write results.csv and results.json, each replaced atomically.

    Args:
        folder: where to write them.
        rows: the results.
        facts: the content of the JSON besides the rows.

    Returns:
        What `read` then returns.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(folder / "results.csv") as file:
        file.write(text.getvalue().encode())
    result = {"format": FORMAT, **facts, "columns": COLUMNS}
    write_rows(folder / "results.json", {**result, "rows": [[row[name] for name in COLUMNS] for row in rows]})
    return {**result, "rows": list(rows)}


def read(path: Path) -> Row | None:
    """Read a results.json.

    Args:
        path: the file.

    Returns:
        Its content, each row by column; None for a JSON file of another kind.

    Raises:
        ValueError: it cannot be read.
    """
    result = read_json(path)
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        return None
    return {**result, "rows": [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]}
