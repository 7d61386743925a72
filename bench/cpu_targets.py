"""The CPU's targets: the transform's three orders on the paper's networks, and the host time of a call.

    python bench/cpu_targets.py --out bench/results/cpu_targets.json

writes that file and a Markdown table beside it, whose rows of the meta-iteration are read from `--meta`, files of
bench/meta_peers.py. Processes differ by more than the rounds within one. Several processes therefore measure
everything, one after the other, and a target holds if the median over them does. `cpu_target_run.py` describes a
process; each is followed by one that leaves freed memory to glibc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.cpu_target_lines import markdown
from bench.cpu_target_run import Row
from kfo_ext.bench.result import facts_of, write_result
from kfo_ext.ops import library
from kfo_ext.runs.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def run(repeats: int, *more: str) -> Row:
    """Measure in a new process.

    Args:
        repeats: rounds of every order.
        *more: further arguments of bench/cpu_target_run.py.

    Returns:
        The result of bench/cpu_target_run.py.

    Raises:
        subprocess.CalledProcessError: the process failed; its message is on stderr.
    """
    command = [sys.executable, "-m", "bench.cpu_target_run", "--repeats", str(repeats), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def over_runs(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows that every run has: the median, least and most of their medians, and each run's own median."""
    rows = []
    for same in zip(*runs, strict=True):
        row = next((row for row in same if "seconds" not in row), dict(same[0]))
        if "seconds" in row:
            row["runs"] = medians = [row["seconds"]["median"] for row in same]
            row["seconds"] = {"median": statistics.median(medians), "low": min(medians), "high": max(medians)}
        rows.append(row)
    return rows


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The rows by contender, so that those of different runs match: their order differs if a contender fails."""
    return sorted(rows, key=lambda row: (row["group"], row["order"], row["contender"]))


def meta_results(paths: Sequence[str]) -> Row:
    """The rows of files of bench/meta_peers.py, each with its number of tasks, and their origin."""
    files = [read_json(Path(path)) for path in paths]
    return {
        "meta": [row | {"tasks": file["settings"]["tasks"]} for file in files for row in file["rows"]],
        "meta_from": [
            {"command": file["command"], "commit": file["commit"], "repeats": file["settings"]["repeats"]}
            for file in files
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="processes that measure everything")
    parser.add_argument("--repeats", type=int, default=21, help="rounds of every order in each")
    parser.add_argument("--meta", nargs="*", default=[], help="files of bench/meta_peers.py")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes beside it")
    options = parser.parse_args(arguments)
    available, reason = library.status()["cpu"]
    if not available:
        parser.error(f"the compiled CPU library: {reason}")
    if min(options.runs, options.repeats) < 1:
        parser.error("--runs, --repeats: expected at least 1")
    facts, meta, kept, as_it_comes = facts_of(options), meta_results(options.meta), [], []
    for number in range(1, options.runs + 1):
        print(f"run {number} of {options.runs}", file=sys.stderr)
        kept.append(run(options.repeats))
        as_it_comes.append(run(options.repeats, "--as-glibc-comes"))
    result = facts | {
        "cpu_isa": library.cpu_isa(),
        "keeps_freed_memory": [run["keeps_freed_memory"] for run in kept],
        "fma_gflop_per_s": [run["fma_gflop_per_s"] for run in kept],
        "rows": over_runs([in_order(run["rows"]) for run in kept]),
        "host": over_runs([run["host"] for run in kept]),
        "as_glibc_comes": over_runs([in_order(run["rows"]) for run in as_it_comes]),
        **meta,
    }
    if options.out:
        write_result(options.out, result, markdown)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
