"""`python -m experiments`: list the entries, compute missing results, write the report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .entry import BUDGETS, Entry
from .registry import ENTRIES, chosen
from .runner import Runner, pause
from .store import RESULTS, Results

RUNS = Path("runs/experiments")
DATA_VARIABLE = "KFO_DATA"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"experiments: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="list the entries and their state")
    listing.add_argument("--budget", choices=BUDGETS, default="cpu")
    listing.set_defaults(command=_list)
    run = commands.add_parser("run", help="compute what is missing, from where the last call was stopped")
    run.add_argument("names", nargs="*", metavar="NAME", help="entries, or groups of them; none is all")
    run.add_argument("--budget", choices=BUDGETS, default="cpu", help="ci takes two meta-iterations of each")
    run.add_argument("--data", type=Path, help=f"folder with the data sets; none is ${DATA_VARIABLE}, else data/")
    jobs = "processes, of one thread each; what measures time gets none beside it, and no other program should run then"
    run.add_argument("--jobs", type=int, default=2, help=jobs)
    run.add_argument("--runs", type=Path, default=RUNS, help="folder of the run folders")
    run.add_argument("--results", type=Path, help="folder of the result files; none is experiments/results")
    run.add_argument("--pause", action="store_true", help="stop every other `run`, within a minute")
    run.set_defaults(command=_run)
    report = commands.add_parser("report", help="write docs/paper.md and its pictures from the result files")
    report.set_defaults(command=_report)
    return parser


def _list(options: argparse.Namespace) -> int:
    for entry in ENTRIES.values():
        sys.stdout.write(f"{entry.name:32} {entry.group:12} {_state(entry, options.budget):16} {entry.title}\n")
    return 0


def _state(entry: Entry, budget: str) -> str:
    if budget not in entry.works:
        return "not run"
    results = Results(entry, budget, others=ENTRIES)
    if results.complete:
        return "done"
    return f"{len(results.records)} runs" if results.records else "missing"


def _run(options: argparse.Namespace) -> int:
    if options.pause:
        sys.stdout.write(f"paused: {pause(options.runs)}\n")
        return 0
    if options.jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {options.jobs}")
    roots, entries = _roots(options.data), []
    for entry in chosen(options.names):
        if absent := [name for name in entry.data if name not in roots]:
            message = f"{entry.name}: needs the data set {absent[0]}, which is not in --data"
            if options.names:
                raise ValueError(message)
            sys.stdout.write(f"{message}: left out\n")
        elif options.budget not in entry.works:
            sys.stdout.write(f"{entry.name}: not run at this budget: {entry.why_not}\n")
        else:
            entries.append(entry)
    # Two meta-iterations show that an entry runs; their results are not kept.
    results = options.results or (options.runs / "ci-results" if options.budget == "ci" else RESULTS)
    return 0 if Runner(entries, options.budget, roots, options.runs, results, options.jobs, ENTRIES).run() else 1


def _report(options: argparse.Namespace) -> int:
    from .report import PAGE, write

    sys.stdout.write(f"{len(write())} files: {PAGE} and its pictures\n")
    return 0


def _roots(data: Path | None) -> dict[str, Path]:
    """The folder of each data set that exists."""
    folder = data or Path(os.environ.get(DATA_VARIABLE, "data"))
    if data is not None and not data.is_dir():
        raise ValueError(f"--data: expected a folder, got {data}")
    names = {name for entry in ENTRIES.values() for name in entry.data}
    return {name: (folder / name).resolve() for name in sorted(names) if (folder / name).is_dir()}


if __name__ == "__main__":
    sys.exit(main())
