"""One order of one group a few times, for a profiler: the case of `kfo bench` furthest from the floor, or one by name.

ncu --profile-from-start off --set full python bench/one_call.py --worst-of runs/bench/results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kfo_ext.bench import report
from kfo_ext.bench.cases import ORDERS, random_case
from kfo_ext.bench.points import GROUPS
from kfo_ext.bench.providers import kfo_packed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worst-of", type=Path, help="results.json of the axis tasks; absent, those below decide")
    parser.add_argument("--group", choices=GROUPS, default="CNN(4)")
    parser.add_argument("--order", choices=ORDERS, default="double_backward")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    group, order, tasks = options.group, options.order, options.tasks
    result = report.read(options.worst_of) if options.worst_of and options.worst_of.exists() else None
    if result and (row := report.worst([row for row in result["rows"] if row["axis"] == "tasks"])):
        group, order, tasks = row["group"], row["order"], row["tasks"]
    call = kfo_packed(random_case(GROUPS[group], tasks, torch.float32, options.device))[order]
    print(f"{group}, {tasks} tasks, {order}")
    call()
    if options.device == "cpu":
        return 0
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        for _ in range(options.calls):
            call()
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
