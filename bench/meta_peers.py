"""One whole meta-iteration, loss and second-order meta-gradients: kfo_ext against every other implementation.

    python bench/meta_peers.py --out meta_peers.json
    python bench/meta_peers.py --device cuda --out meta_peers.json

Two methods: MAML + linear KFO (psd, adapted factors), and plain MAML. The contenders are in `meta_contenders.py`; each
has the same network, initialization and tasks. Before one is timed, its loss and all its meta-gradients are compared
with trusted ones, in float64 and in float32; one that is wrong, fails or is not installed is a row that says so.
`meta_memory.py` defines the memory columns. Times are medians of interleaved runs, without compilation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.meta_case import METHODS, NETWORKS, full_float32
from bench.meta_contenders import CONTENDERS
from bench.meta_memory import peak_memory
from bench.meta_truth import kept_truth, verified
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.result import Row, facts_of, write_result
from kfo_ext.bench.timing import interleaved, rested
from kfo_ext.ops import library


def measure(network: str, method: str, names: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """One row per contender: errors, times, the ratio to kfo_ext, memory."""
    settings = {"tasks": options.tasks, "steps": options.steps, "lr": options.lr}
    sizes = NETWORKS[network]
    truth = kept_truth(options.truths, sizes, method, **settings)
    if options.only_truths:
        print(f"{network} {method}: trusted gradients {truth.checked}", flush=True)
        return []
    functions, rows = verified(sizes, method, names, truth, device=options.device, **settings)
    timings = interleaved(functions, options.repeats, sample=rested(finished)) if functions else {}
    ours = next((timings[name].median for name in timings if name.startswith("ours")), None)
    for name, timing in timings.items():
        rows[name]["seconds"] = timing._asdict()
        rows[name]["over_ours"] = None if ours is None else timing.median / ours
        if options.memory:
            try:
                rows[name]["memory"] = peak_memory(sizes, method, name, options.device, **settings)
            except Exception as error:  # any error is a result to report
                rows[name]["memory"] = f"{type(error).__name__}: {error}"
    facts = {"network": network, "method": method, "convolution_flops": truth.flops, "truth": truth.checked}
    return [facts | row for row in rows.values()]


def show(rows: list[Row]) -> None:
    """Print one table per network and method."""
    group = None
    for row in rows:
        if group != (row["network"], row["method"]):
            group = row["network"], row["method"]
            print(
                f"\n{row['network']} {row['method']}: {row['convolution_flops'] / 1e9:.2f} GFLOP of convolutions, "
                f"trusted gradients {row['truth']}\n"
                f"{'contender':31} {'median':>10} {'20 % .. 80 %':>22} {'over ours':>9} {'first run':>9} "
                f"{'peak':>8} {'working':>8}"
            )
        if "seconds" not in row:
            print(f"{row['contender']:31} {row['status']}", flush=True)
            continue
        seconds, memory = row["seconds"], row.get("memory", {})
        over = "" if row["over_ours"] is None else f"{row['over_ours']:.2f}"
        sizes = (
            memory
            if isinstance(memory, str)
            else " ".join(f"{memory[k] / 2**20:5.0f} MB" for k in memory if k != "first")
        )
        print(
            f"{row['contender']:31} {1e3 * seconds['median']:7.1f} ms {1e3 * seconds['low']:9.1f} .. "
            f"{1e3 * seconds['high']:9.1f} {over:>9} {row['first_run']:7.1f} s {sizes}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the result; returns 1 if a contender of kfo_ext gave wrong numbers, else 0."""
    every = sorted({name for table in CONTENDERS.values() for name in table})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=["omniglot_cnn2", "omniglot_cnn4", "cifar_fs_cnn2"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(reversed(METHODS)))
    parser.add_argument("--contenders", nargs="+", choices=every, default=every, help="where a method has them")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--lr", type=float, default=0.1, help="inner learning rate; bears on the checks alone")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the processes for memory")
    parser.add_argument("--truths", type=Path, help="folder that keeps trusted gradients, for this code and machine")
    parser.add_argument("--only-truths", action="store_true", help="compute the trusted gradients alone")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    full_float32()
    facts = facts_of(options) | {"backends": library.status()}
    rows = []
    for network in options.networks:
        for method in options.methods:
            names = [name for name in CONTENDERS[method] if name in options.contenders]
            measured = measure(network, method, names, options)
            show(measured)
            rows += measured
            # After each table, so that results are kept if a later one takes too long.
            if options.out:
                write_result(options.out, facts | {"rows": rows})
    return int(any("WRONG" in row["status"] for row in rows if _is_ours(row["contender"])))


def _is_ours(contender: str) -> bool:
    return contender.startswith(("our", "by_step")) or contender.endswith(("our_kfo", "fast_layers"))


if __name__ == "__main__":
    raise SystemExit(main())
