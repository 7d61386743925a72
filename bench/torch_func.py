"""A meta-iteration in torch.func style with our three operators, against the same program in plain torch.

    python bench/torch_func.py --out torch_func.json

Both programs are in `bench/meta_torch_func.py`: functional_call and grad per task, vmap over tasks, grad of the mean
query loss. Before timing, the loss and meta-gradients of each are compared with trusted ones in float64 and float32.
Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.meta_case import METHODS, NETWORKS, full_float32
from bench.meta_truth import find_truth, verified
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.result import Row, facts_of, write_result
from kfo_ext.bench.timing import interleaved, rested
from kfo_ext.machine import keep_freed_memory

PLAIN, OURS = PROGRAMS = ("torch_func", "torch_func_ours")
CNNS = [name for name, network in NETWORKS.items() if network.form == "cnn"]


def measure(network: str, method: str, options: argparse.Namespace) -> list[Row]:
    """One row per program: errors and times; ours has the speed-up."""
    settings = {"tasks": options.tasks, "steps": options.steps, "lr": options.lr}
    truth = find_truth(NETWORKS[network], method, **settings)
    functions, rows = verified(NETWORKS[network], method, PROGRAMS, truth, **settings)
    if set(functions) == set(PROGRAMS):
        timings = interleaved(functions, options.repeats, sample=rested(finished))
        for name, timing in timings.items():
            rows[name]["seconds"] = timing._asdict()
        rows[OURS]["speed_up"] = timings[PLAIN].median / timings[OURS].median
    return [{"network": network, "method": method, "truth": truth.checked} | row for row in rows.values()]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if a program gave a wrong loss or meta-gradient, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=CNNS, default=["omniglot_cnn2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--lr", type=float, default=0.1, help="inner learning rate; affects only the checks")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    full_float32()
    facts = facts_of(options) | {"keeps_freed_memory": keep_freed_memory()}
    rows: list[Row] = []
    for network in options.networks:
        for method in options.methods:
            rows += measure(network, method, options)
            for row in rows[-len(PROGRAMS) :]:
                seconds = f"{1e3 * row['seconds']['median']:8.1f} ms" if "seconds" in row else row["status"]
                over = f" {row['speed_up']:.2f}x" if "speed_up" in row else ""
                print(f"{network:15} {method:5} {row['contender']:16} {seconds}{over}", flush=True)
            if options.out:
                write_result(options.out, facts | {"rows": rows})
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
