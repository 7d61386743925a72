"""What `kfo bench` prints and writes: a table, results.csv and results.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from kfo_ext.bench.measure import TOO_SLOW
from kfo_ext.bench.result import write_rows
from kfo_ext.bench.rows import COLUMNS, Row, loses
from kfo_ext.runs.files import atomic_write, read_json

# The first key of a results.json, by which it is known.
FORMAT = "kfo bench 2"
HEAD = (
    f"{'provider':23} {'median':>10} {'20 % .. 80 %':>21} {'GB/s':>7} {'GFLOP/s':>8} {'of floor':>8}"
    f" {'memory':>9} {'error':>7}  against the fastest other"
)


def seconds_text(seconds: float) -> str:
    """As in `12.3 us`."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(count: int | None) -> str:
    """As in `1.2 MB`; nothing for None."""
    if count is None:
        return ""
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def line(row: Row) -> str:
    """One row of the table; `+` marks what reads saved intermediates, LOSES a row of ours that another beats."""
    name = f"{'* ' if row['ours'] else '  '}{row['provider']}{' +' if row['saved'] else ''}"
    if row["status"] != "ok":
        return f"{name:23} {row['status']}"
    span = f"{seconds_text(row['low_s'])} .. {seconds_text(row['high_s'])}"
    moved = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.3g}"
    rate = "" if row["gflop_per_s"] is None else f"{row['gflop_per_s']:.3g}"
    share = "" if row["floor_share"] is None else f"{row['floor_share']:.3f}"
    against = ""
    if row["best_other"]:
        against = f"{row['other_over_this']:.2f}x of {row['best_other']}{' +' if row['other_saved'] else ''}"
        against += "  LOSES" if loses(row) else ""
    text = (
        f"{name:23} {seconds_text(row['median_s']):>10} {span:>21} {moved:>7} {rate:>8}"
        f" {share:>8} {bytes_text(row['peak_bytes']):>9} {row['error']:7.0e}  {against}"
    )
    return text.rstrip()


def table(rows: Sequence[Row]) -> Iterable[str]:
    """The lines of a table of one point: a head for each order and mode."""
    heading = None
    for row in rows:
        mode = "" if row["mode"] == "eager" else f", {row['mode']}"
        now = f"{row['axis']}={row['x']}  {row['group']}, {row['tasks']} tasks: {row['order']}{mode}"
        if now != heading:
            yield ""
            yield now
            yield HEAD
            heading = now
        yield line(row)


def fit_table(fits: Sequence[Row]) -> Iterable[str]:
    """The exponents, a line for each axis, group and order."""
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
    """How often each provider of ours is beaten, where worst, and by what that read saved intermediates.

    rows: each measurement once, not again for every axis that it lies on
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


def worst(rows: Sequence[Row]) -> Row | None:
    """Our native row that is furthest from the floor, replayed from a CUDA graph where that was measured."""
    ours = [row for row in rows if row["provider"] == "native" and row["floor_share"] is not None]
    replayed = [row for row in ours if row["mode"] == "graph"]
    return min(replayed or ours, key=lambda row: row["floor_share"], default=None)


def left_out(rows: Sequence[Row]) -> Iterable[str]:
    """What was not measured for want of time, whole points and single providers: how many, and which.

    rows: as `losses` takes them
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
    """results.csv and results.json, each replaced as a whole; what `read` then gives.

    facts: what goes into the JSON besides the rows
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
    """A results.json, each of its rows by column, or None for a JSON file of another kind.

    Raises:
        ValueError: it cannot be read.
    """
    result = read_json(path)
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        return None
    return {**result, "rows": [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]}
