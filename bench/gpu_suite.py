"""Runs the parts of `gpu_parts.py` within a budget of time: `bash bench/gpu_suite.sh` says how to call it.

Each part must end by the sum of the limits up to it: what the stages before it left is its own too, and none takes from
those after it. A part that fails, or is out of time and killed, is a line of the summary, and the suite goes on.
Summary and tar are written anew at every stage: whenever this process dies, they are there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.gpu_logs import first_failure, last_line, quoted, read
from bench.gpu_parts import Part, Stages, Table

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "build" / "gpu_carry"
BUDGET = 480
# Of the budget: what it takes to stop the last part and to pack.
RESERVE = 10
# Of a part's time: after an interrupt, upon which pytest prints what failed so far, until it is killed.
GRACE = 4
# While parts run side by side, seconds between two summaries.
REFRESH = 20
MOST_OF_SUMMARY = 5900
MOST_OF_LINE = 240
MOST_OF_TAR = 15 * 2**20
SMOKE = "smoke"


class Result(NamedTuple):
    """How a part ended; `status` is passed, FAILED, running, or left out."""

    status: str
    seconds: float = 0
    detail: str = ""


class Running(NamedTuple):
    """A part that runs: its process, when it began, and when it must have ended."""

    process: subprocess.Popen
    start: float
    end: float


class Stopped(BaseException):
    """A signal that ends the suite."""


class Suite:
    """One run.

    stages: what to run
    out: folder for the summary and the tar
    work: folder for logs and results; its contents are deleted
    budget: seconds
    """

    def __init__(self, stages: Stages, out: Path, work: Path, budget: float = BUDGET, commit: str = "") -> None:
        self.stages, self.out, self.work, self.budget = stages, out, ROOT / work, budget
        self.commit = commit
        self.start = time.monotonic()
        self.results: dict[str, Result] = {}
        self.running: dict[str, Running] = {}
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in (self.work, out):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Runs everything; whether all of it passed."""
        try:
            with signals_raise():
                begin = self.start
                for stage in self.stages:
                    self._stage(stage, begin)
                    begin += max(part.limit for part in stage)
        except Stopped as stopped:
            # First: who sent the signal may not wait for the parts to end.
            self._write()
            self._stop(list(self.running), f"stopped by {stopped}")
        finally:
            for part in self._parts():
                self.results.setdefault(part.name, Result("left out", detail="the suite ended before it"))
            self._write()
        return all(result.status == "passed" for result in self.results.values())

    def _parts(self) -> list[Part]:
        return [part for stage in self.stages for part in stage]

    def _stage(self, stage: list[Part], begin: float) -> None:
        """Runs the parts of one; `begin` is when it would if all before it had needed their limits."""
        last = self.start + self.budget - RESERVE
        for part in stage:
            self._begin(part, min(begin + part.limit, last))
        self._write()
        written = time.monotonic()
        while self.running:
            time.sleep(0.1)
            self._collect()
            now = time.monotonic()
            if late := [name for name, part in self.running.items() if now >= part.end - GRACE]:
                self._stop(late, "out of time")
            # A part that runs alone is timed, and left alone.
            if len(stage) > 1 and now - written > REFRESH:
                self._write()
                written = time.monotonic()

    def _smoke_failed(self) -> bool:
        return self.results.get(SMOKE, Result("passed")).status != "passed"

    def _begin(self, part: Part, end: float) -> None:
        now = time.monotonic()
        if end - now <= GRACE:
            self.results[part.name] = Result("left out", detail=f"the {self.budget:g} s are spent")
            return
        if part.if_right and self._smoke_failed():
            self.results[part.name] = Result("left out", detail="the smoke test failed")
            return
        print(f"== {part.name}, at most {end - now:.0f} s: {' '.join(part.command)}", flush=True)
        # pytest cuts the reason of a failure to the width of a line.
        env = {"KFO_COMMIT": self.commit, **os.environ, "COLUMNS": "250", **part.env}
        self.results[part.name] = Result("running")
        try:
            with self._log(part.name).open("wb") as log:
                # A group of its own, to be killed as a whole; not a session: it must not outlive who started the suite.
                process = subprocess.Popen(
                    part.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    preexec_fn=os.setpgrp,
                )  # fmt: skip
        except OSError as error:
            self.results[part.name] = Result("FAILED", 0, f"{part.command[0]} does not start: {error.strerror}")
            return
        self.running[part.name] = Running(process, now, end)

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _collect(self) -> None:
        for name, (process, start, _) in list(self.running.items()):
            if process.poll() is not None:
                # What it has left running would disturb the next.
                _kill(process)
                self._ended(name, start, process.returncode)

    def _ended(self, name: str, start: float, status: int, why: str = "") -> None:
        lines, seconds = read(self._log(name)), time.monotonic() - start
        if status == 0 and not why:
            self.results[name] = Result("passed", seconds, last_line(lines))
        else:
            detail = f"{why or f'status {status}'}; first: {first_failure(lines)}; last: {last_line(lines)}"
            self.results[name] = Result("FAILED", seconds, detail)
        # Not earlier: a signal that ends the suite kills what is in the table.
        del self.running[name]
        print(self._line(name), flush=True)

    def _stop(self, names: list[str], why: str) -> None:
        """Interrupts these, and kills what is still there a little later."""
        for name in names:
            with suppress(ProcessLookupError):
                self.running[name].process.send_signal(signal.SIGINT)
        end = time.monotonic() + GRACE
        for name in names:
            process, start, _ = self.running[name]
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            _kill(process)
            process.wait()
            self._ended(name, start, process.returncode, f"{why} after {time.monotonic() - start:.0f} s")

    def _line(self, name: str) -> str:
        result = self.results[name]
        return f"{result.status:8} {name:15} {result.seconds:4.0f} s  {result.detail}"

    def summary(self) -> str:
        """Under 6,000 characters: a line for each part, then what of their logs is quoted, as far as there is room."""
        passed = sum(result.status == "passed" for result in self.results.values())
        seconds = time.monotonic() - self.start
        lines = [
            f"gpu_suite: {passed} of {len(self._parts())} parts passed in {seconds:.0f} s; {self.commit or 'no commit'}"
        ]
        lines += [self._line(name)[:MOST_OF_LINE] for name in self.results]
        for part in self._parts():
            if part.show and part.name in self.results and (quotes := quoted(read(self._log(part.name)), part.show)):
                lines += ["", f"-- {part.name}", *quotes]
        text, cut = "", "... the rest is in gpu_suite.tar.gz\n"
        for line in lines:
            if len(text) + len(line) + 1 + len(cut) > MOST_OF_SUMMARY:
                return text + cut
            text += f"{line}\n"
        return text

    def _write(self) -> None:
        """Replaces the summary and the tar, each as a whole."""
        text = self.summary()
        (self.work / "summary.txt").write_text(text)
        _replace(self.out / "summary.txt", lambda path: path.write_text(text))
        _replace(self.out / "gpu_suite.tar.gz", self._pack)

    def _pack(self, path: Path) -> None:
        files = sorted((file for file in self.work.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        while True:
            with tarfile.open(path, "w:gz", compresslevel=5) as tar:
                for file in files:
                    # A part may replace its file meanwhile.
                    with suppress(FileNotFoundError):
                        tar.add(file, f"gpu_suite/{file.relative_to(self.work)}")
            if path.stat().st_size <= MOST_OF_TAR or not files:
                return
            print(f"{files.pop()} does not fit into the tar", flush=True)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raises `Stopped` at the first signal to end within the block; further ones are ignored from there on."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    for number in numbers:
        signal.signal(number, stop)
    yield


def _kill(process: subprocess.Popen) -> None:
    """The whole group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def chosen(table: Table, names: list[str]) -> Stages:
    """The stages of the named parts, the libraries first.

    Returns:
        The stages; those of the table itself if no part is named.

    Raises:
        ValueError: there is no such part.
    """
    if not names:
        return table.main()
    every = [*table.main(), *table.extras()]
    known = [part.name for stage in every for part in stage]
    for name in names:
        if name not in known:
            raise ValueError(f"PARTS: expected some of {', '.join(known)}, got {name!r}")
    picked = [[part for part in stage if part.name in (*names, "libraries")] for stage in every]
    return [stage for stage in picked if stage]


def commit() -> str:
    """That of the checkout, or of what was carried; empty where neither is known."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    carried = CARRIED / "commit"
    return carried.read_text().strip() if carried.exists() else ""


def main() -> int:
    """0 if every part passed, else 1."""
    # From the root, where the parts run: results name it.
    work = Path("build", "gpu_suite")
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu_suite_out")
    scale = float(os.environ.get("KFO_TEST_TIMEOUT_SCALE") or 1)
    budget = float(os.environ.get("BUDGET") or BUDGET)
    stages = chosen(Table(os.environ.get("DEVICE") or "cuda", work), os.environ.get("PARTS", "").split())
    longer = [[part._replace(limit=scale * part.limit) for part in stage] for stage in stages]
    suite = Suite(longer, out, work, scale * budget, commit())
    right = suite.run()
    print(suite.summary(), end="", flush=True)
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
