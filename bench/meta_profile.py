"""The time of kfo_ext's meta-iteration by stage, from torch's profiler.

    python bench/meta_profile.py --out meta_profile.json

writes that file and the table beside it as Markdown. Every op's own time counts for the stage that `stages.py` finds by
its name and by the backward node around it; the remaining wall-clock time is Python and the autograd engine. On a CUDA
device a second column holds the kernels' time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.meta_case import METHODS, NETWORKS, Contender, full_float32, make_case
from bench.meta_contenders import CONTENDERS
from bench.stages import STAGES, is_operation, stage_of
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.result import Row, facts_of, provenance, write_result
from kfo_ext.bench.timing import interleaved

OVERHEAD = "Python and autograd"


def profile_stages(contender: Contender, repeats: int, device: str) -> tuple[float, list[Row]]:
    """Measure the seconds of one profiled run, and per stage its seconds on host (and device), calls, largest ops."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    contender.run()
    with profile(activities=activities) as profiler:
        wall = finished(contender.run, repeats)
    totals = {stage: {"host": 0.0, "device": 0.0, "calls": 0, "ops": {}} for stage in STAGES}
    for event in profiler.events():
        # The profiler lists kernels twice: as separate events, and as part of the ops that launch them.
        if event.device_type != torch.autograd.DeviceType.CPU or not is_operation(lineage(event)):
            continue
        total = totals[stage_of(lineage(event))]
        host, on_device = event.self_cpu_time_total / 1e6, event.self_device_time_total / 1e6
        total["host"] += host
        total["device"] += on_device
        total["calls"] += 1
        total["ops"][event.name] = total["ops"].get(event.name, 0.0) + (on_device if device == "cuda" else host)
    rows = []
    for stage, total in totals.items():
        largest = sorted(total["ops"], key=total["ops"].get, reverse=True)[:3]
        rows.append(
            {"stage": stage, "host": total["host"] / repeats, "calls": total["calls"] / repeats, "largest": largest}
            | ({"device": total["device"] / repeats} if device == "cuda" else {})
        )
    rest = wall - sum(row["host"] for row in rows)
    rows.append(
        {"stage": OVERHEAD, "host": rest, "calls": 0, "largest": []} | ({"device": 0.0} if device == "cuda" else {})
    )
    return wall, rows


def lineage(event) -> list[str]:
    """The names of a profiler's event and of all events around it, the outermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names[::-1]


def table(entry: Row) -> str:
    """Markdown of one profile: one line per stage that took any time."""
    wall, rows = entry["wall"], entry["stages"]
    title = (
        f"{entry['network']}, {entry['method']}: {1e3 * wall:.1f} ms profiled, "
        f"{1e3 * entry['unprofiled']:.1f} ms without the profiler"
    )
    on_device = "device" in rows[0]
    head = ["stage", "host, ms", "share of the wall clock", *(["device, ms"] if on_device else []), "ops", "largest"]
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        if not row["calls"] and row["stage"] != OVERHEAD:
            continue
        cells = [row["stage"], f"{1e3 * row['host']:.1f}", f"{row['host'] / wall:.0%}"]
        cells += [f"{1e3 * row['device']:.1f}"] if on_device else []
        lines.append(f"| {' | '.join([*cells, format(row['calls'], '.0f'), ', '.join(row['largest'])])} |")
    return "\n".join(lines) + "\n"


def markdown(result: Row) -> str:
    """The provenance of the profiles, and a table for each."""
    processor = result["device"] if result["settings"]["device"] == "cuda" else result["processor"]
    intro = (
        f"Made by `python bench/{result['command']}` on {processor}, torch {result['torch']}, "
        f"{result['torch_threads']} threads, {provenance(result)}.\n"
    )
    return "\n".join([intro, *(table(entry) for entry in result["profiles"])])


def main(arguments: list[str] | None = None) -> int:
    """Profile the networks and methods, print the tables and write the result; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=["omniglot_cnn2", "omniglot_cnn4", "cifar_fs_cnn2"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes beside it, ending in .md")
    options = parser.parse_args(arguments)
    full_float32()
    facts = facts_of(options)
    results = []
    for network in options.networks:
        for method in options.methods:
            case = make_case(NETWORKS[network], method, tasks=options.tasks, steps=options.steps, device=options.device)
            contender = CONTENDERS[method]["ours_native" if method == "kfo" else "ours"](case)
            plain = interleaved({"ours": contender.run}, options.repeats, sample=finished)["ours"].median
            wall, rows = profile_stages(contender, options.repeats, options.device)
            results.append({"network": network, "method": method, "wall": wall, "unprofiled": plain, "stages": rows})
            print(table(results[-1]), flush=True)
    if options.out:
        write_result(options.out, facts | {"profiles": results}, markdown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
