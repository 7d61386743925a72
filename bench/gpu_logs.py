"""What a part's log says in a line: how it ended, the first thing that failed, and the lines worth quoting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Of a log that a broken program filled, the start and the end.
MOST_READ = 2**21
# Characters of what failed first, and of a quoted line.
WIDTH, QUOTE = 150, 110
_TEST = re.compile(r"(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$|(\S+::.+?) (?:FAILED|ERROR)\b")
# compute-sanitizer begins each of its lines so; of the rest, the lines of sanitize_case.py, and of any Python program.
_FOUND = re.compile(r"={9} (?!COMPUTE-SANITIZER|Target|RACECHECK SUMMARY: 0|ERROR SUMMARY: 0)(.+)|(.* is off by .*)")
_ERROR = re.compile(r"(?:E +)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*|error: .*)")


def read(log: Path) -> list[str]:
    """Its lines."""
    text = log.read_bytes() if log.exists() else b""
    if len(text) > MOST_READ:
        text = text[: MOST_READ // 2] + b"\n...\n" + text[-MOST_READ // 2 :]
    return text.decode(errors="replace").splitlines()


def last_line(lines: list[str]) -> str:
    """The last that is not empty: the result, of every program that the suite runs."""
    return short(next((line for line in reversed(lines) if line.strip(" =")), "it printed nothing"))


def first_failure(lines: list[str]) -> str:
    """The first test that failed and why, or the first error of a sanitizer or of Python; else the last line."""
    failed = list(_failed_tests(lines))
    if failed:
        name = failed[0][0]
        return short(" - ".join([name, *[why for other, why in failed if other == name and why][:1]]))
    for pattern in (_FOUND, _ERROR):
        for line in lines:
            if match := pattern.match(line):
                return short(next(filter(None, match.groups())))
    return last_line(lines)


def _failed_tests(lines: list[str]) -> Iterator[tuple[str, str | None]]:
    for line in lines:
        if match := _TEST.match(line.rstrip()):
            yield match[1] or match[3], match[2]


def quoted(lines: list[str], show: str) -> list[str]:
    """Those that begin as `show` says."""
    return [short(line, QUOTE) for line in lines if show and re.match(show, line)]


def short(line: str, width: int = WIDTH) -> str:
    """With single spaces, and cut to a width."""
    text = re.sub(r"\s+", " ", line).strip(" =")
    return text if len(text) <= width else f"{text[: width - 3]}..."
