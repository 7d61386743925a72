"""`kfo demo`: on procedural glyphs, a shallow network meta-learns better with a learned Kronecker-factored update.

Both start from a zero head, which serves plain MAML best. The inner rates were tuned by the accuracy on 200 validation
tasks after 120 meta-iterations, with

    kfo train --update UPDATE --init zero_head --inner-lr RATE --iterations 120 --validation-every 60 --threads 1

    MAML   0.25: .658   0.5: .796   1: .723   1.5: .745   2: .675   3: .560      reference start, 0.08: .663
    KFO    0.1: .641    0.25: .823   0.5: .881   1: .875                         reference start, 0.25: .847
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from kfo_ext.choices import LARGEST_INTEGER
from kfo_ext.runs import RunFolder, plot_runs
from kfo_ext.trainer import compare_runs
from kfo_ext.trainer.signals import stop_requested

RATES = {"none": 0.5, "kfo": 0.5}
LABELS = {"none": "MAML", "kfo": "KFO"}
# The iterations are out of reach: the time budget ends the training.
TRAINING = {
    "dataset": "glyphs",
    "init": "zero_head",
    "iterations": 100_000,
    "validation-every": 50,
    "validation-tasks": 100,
    "threads": 1,
}


def run(folder: Path, *, time_budget: float, tasks: int, echo: Callable[[str], None]) -> None:
    """Meta-train MAML and KFO side by side, evaluate both on the same tasks, and draw both curves.

    Args:
        folder: absent or empty; receives the run folders none and kfo, their logs and curves.png.
        time_budget: seconds of training for each.
        tasks: number of test tasks.
        echo: prints one line.

    Raises:
        ValueError: an argument is out of range, the folder is not empty, or a part of the work fails.
    """
    if not (time_budget > 0 and math.isfinite(time_budget)):
        raise ValueError(f"time_budget: expected seconds above 0, got {time_budget}")
    if not 2 <= tasks <= LARGEST_INTEGER:
        raise ValueError(f"tasks: expected at least 2, for an interval, and at most 64 bits, got {tasks}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected an absent or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    runs = {update: RunFolder(folder / update) for update in RATES}
    echo(f"meta-training CNN(2), 5-way 5-shot glyphs, {time_budget:.0f} s each: MAML and KFO, one thread each")
    _all(folder, {update: _training(update, runs[update], time_budget) for update in RATES}, time_budget)
    echo(f"evaluating both on the same {tasks} tasks of unseen characters")
    _all(folder, {u: ["eval", str(runs[u].path), "--tasks", str(tasks), "--threads", "1"] for u in RATES}, 0.0)
    picture = folder / "curves.png"
    plot_runs({LABELS[update]: runs[update].metrics for update in RATES}, picture)
    ours, theirs, gap = compare_runs(runs["kfo"], runs["none"])
    echo(f"MAML  {theirs.measure} {theirs.interval}  (inner rate {RATES['none']}, tuned; iteration {theirs.iteration})")
    echo(f"KFO   {ours.measure} {ours.interval}  (inner rate {RATES['kfo']}, tuned; iteration {ours.iteration})")
    echo(f"KFO - MAML, paired: {gap.mean:+.4f} ± {gap.half:.4f}  (95 % interval)")
    echo(f"picture: {picture}")


def _training(update: str, run: RunFolder, time_budget: float) -> list[str]:
    options = {
        "run": run.path,
        "update": update,
        **TRAINING,
        "inner-lr": RATES[update],
        "time-budget": time_budget,
    }
    return ["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def _all(folder: Path, commands: dict[str, list[str]], seconds: float) -> None:
    """Run kfo once for each entry, side by side if there are enough cores, with output to log files.

    Args:
        folder: the folder of the log files.
        commands: arguments of kfo by the name of the update.
        seconds: the expected duration, for the bar; 0 for none.

    Raises:
        ValueError: a command failed; the message has the last line of its log.
    """
    if len(os.sched_getaffinity(0)) < len(commands):
        for name, command in commands.items():
            _side_by_side(folder, {name: command}, seconds)
    else:
        _side_by_side(folder, commands, seconds)


def _side_by_side(folder: Path, commands: dict[str, list[str]], seconds: float) -> None:
    with ExitStack() as stack:
        logs = {name: stack.enter_context(open(folder / f"{name}.log", "a", encoding="utf-8")) for name in commands}
        processes = {}
        for name, command in commands.items():
            line = [sys.executable, "-m", "kfo_ext", *command]
            # A separate session, so that Ctrl-C reaches it once, through this process.
            processes[name] = subprocess.Popen(
                line, stdout=logs[name], stderr=subprocess.STDOUT, start_new_session=True
            )
        with stop_requested() as stop:
            try:
                _wait(list(processes.values()), seconds, stop)
            finally:
                for process in processes.values():
                    # A process that still runs was interrupted: it saves its state.
                    process.terminate()
                    process.wait()
            if stop():
                raise KeyboardInterrupt
    for name, process in processes.items():
        if process.returncode:
            log = folder / f"{name}.log"
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no message"]
            raise ValueError(f"{LABELS[name]} failed: {last[0]} (all of it: {log})")


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float, stop: Callable[[], bool]) -> None:
    start = time.monotonic()
    with tqdm(total=round(seconds), disable=None if seconds else True, unit="s") as bar:
        while not stop() and any(process.poll() is None for process in processes):
            time.sleep(0.2)
            bar.update(min(bar.total, int(time.monotonic() - start)) - bar.n)
