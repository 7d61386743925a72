"""Iterations per second and peak memory of every method, and the ratio of its time to MAML's.

    python bench/method_cost.py --out bench/results/method_cost.json

An iteration is that of `kfo train` on a ready meta-batch: inner loops, meta-gradients and Adam's step, here at an outer
rate of 0. The methods run in turn, so that disturbances of the machine affect all of them. `meta_memory.py` defines the
memory. A Markdown table is written beside the JSON file; `python docs/make_methods.py` copies it into the
documentation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.meta_case import full_float32
from bench.meta_memory import of_process
from bench.method_cases import BASE, CASES, Iteration, config_of
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.result import Row, facts_of, provenance, write_result
from kfo_ext.bench.timing import interleaved, rested
from kfo_ext.machine import keep_freed_memory


def measure_cases(names: list[str], settings: dict[str, Any], options: argparse.Namespace) -> list[Row]:
    """Measure methods, and always MAML.

    Args:
        names: the methods.
        settings: options of all methods.
        options: the command line's options: repeats, memory.

    Returns:
        One row per method.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    names = [name for name in CASES if name == BASE or name in names]
    iterations = {name: Iteration(config_of(name, **settings)) for name in names}
    for name, iteration in iterations.items():
        if not iteration.run().isfinite():
            raise FloatingPointError(f"{name}: the loss is not finite")
    functions = {name: iteration.run for name, iteration in iterations.items()}
    timings = interleaved(functions, options.repeats, sample=rested(finished))
    base = timings[BASE].median
    rows = []
    for name, timing in timings.items():
        row: Row = {
            "method": name,
            "command": CASES[name].command,
            "per_second": 1 / timing.median,
            "over_maml": timing.median / base,
            "most": CASES[name].most,
            "seconds": timing._asdict(),
        }
        if options.memory:
            row["memory"] = of_process("bench.method_cases", {"name": name, **settings})
        rows.append(row)
    return rows


def missed(rows: list[Row]) -> list[str]:
    """The methods that miss their target."""
    return [row["method"] for row in rows if row["most"] is not None and row["over_maml"] > row["most"]]


def markdown(result: Row) -> str:
    """The origin of the numbers, and a line per method."""
    settings, rows = result["settings"], result["rows"]
    late = missed(rows)
    memory = "freed memory kept" if result["keeps_freed_memory"] else "freed memory given back"
    processor = result["processor"] if settings["device"] == "cpu" else result["device"]
    lines = [
        f"Made by `python bench/{result['command']}` on {processor}, torch {result['torch']}, "
        f"{result['torch_threads']} threads, {provenance(result)}: CNN({settings['layers']}) with "
        f"{settings['hidden']} channels, images of 1 x 28 x 28, {settings['tasks']} tasks, {settings['steps']} inner "
        f"steps, medians of {settings['repeats']} interleaved repeats, {memory}.",
        "",
        "An iteration is inner loops, meta-gradients and Adam's step, on tasks that are there. Peak memory is that of "
        "one iteration in a fresh process, over the level before it.",
        "",
        "| method | iterations per second | time / MAML's | target | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        target = "" if row["most"] is None else f"at most {row['most']}"
        peak = f"{row['memory']['peak'] / 1e6:.0f}" if "memory" in row else ""
        lines.append(f"| {row['method']} | {row['per_second']:.2f} | {row['over_maml']:.2f} | {target} | {peak} |")
    return "\n".join([*lines, "", f"Targets missed: {', '.join(late) or 'none'}.", ""])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), help="beside MAML")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--layers", type=int, default=2, help="convolution blocks")
    parser.add_argument("--hidden", type=int, default=32, help="channels of a block")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the processes for memory")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes beside it, ending in .md")
    options = parser.parse_args(arguments)
    full_float32()
    facts = facts_of(options) | {"keeps_freed_memory": keep_freed_memory()}
    settings = {
        "meta_batch": options.tasks,
        **{name: getattr(options, name) for name in ("steps", "layers", "hidden", "device")},
    }
    result = facts | {"rows": measure_cases(options.methods, settings, options)}
    print(markdown(result))
    if options.out:
        write_result(options.out, result, markdown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
