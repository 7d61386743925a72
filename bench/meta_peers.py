"""One whole meta-iteration, loss and second-order meta-gradients: ours against every other way to compute it.

    python bench/meta_peers.py --out meta_peers.json
    python bench/meta_peers.py --device cuda --out meta_peers.json

Two methods: MAML + linear KFO (psd, adapted factors), and plain MAML. The contenders are in `meta_contenders.py`; each
has the same network, start and tasks. Before one is timed its loss and all its meta-gradients are compared with trusted
ones, in float64 and in float32; one that is wrong, fails or is not installed is a row that says so. `meta_memory.py`
says what the memory is. Times are medians of interleaved runs, compilation apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from meta_case import METHODS, NETWORKS, Network, flat, full_float32, make_case
from meta_contenders import CONTENDERS, trusted
from meta_memory import peak_memory
from meta_task_loops import learn2learn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kfo_ext.bench.result import facts_of, finite, write_result
from kfo_ext.bench.timing import interleaved, rested, wall_clock
from kfo_ext.ops import library

# Relative errors allowed. In float32 rounding takes some ReLU to the other side of its kink, here or there by chance: a
# right contender errs by 1e-5 or by 1e-2.
ALLOWED = {torch.float64: 1e-8, torch.float32: 0.1}
Row = dict[str, object]


class Truth(NamedTuple):
    """What a meta-iteration must give, computed in float64 on the CPU by `meta_contenders.trusted`.

    gradients: all of them, one vector
    flops: of convolutions in one meta-iteration, counted as torch executes them
    checked: how it was checked in turn
    """

    loss: float
    gradients: Tensor
    flops: int
    checked: str


def find_truth(network: Network, method: str, **settings) -> Truth:
    """The trusted loss and meta-gradients, checked against learn2learn where that is installed.

    Raises:
        AssertionError: they differ from learn2learn's, or are not finite.
    """
    case = make_case(network, method, dtype=torch.float64, **settings)
    right = trusted(case)
    with FlopCounterMode(display=False) as counter:
        loss = float(right.run())
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    truth = Truth(loss, flat(right.gradients()), convolutions, "")
    if not truth.gradients.isfinite().all():
        raise AssertionError("the meta-gradients are not finite: choose a smaller lr")
    try:
        theirs = learn2learn(case)
    except ImportError:
        return truth._replace(checked="not checked: learn2learn is not installed")
    error = error_of(float(theirs.run()), flat(theirs.gradients()), truth)
    if not error <= ALLOWED[torch.float64]:
        raise AssertionError(f"the trusted meta-gradients differ from learn2learn's by {error:.1e}")
    return truth._replace(checked=f"against learn2learn: {error:.1e}")


def error_of(loss: float, gradients: Tensor, truth: Truth) -> float:
    """The larger of two relative errors: the loss's, and that of all meta-gradients as one vector."""
    if gradients.shape != truth.gradients.shape:
        raise AssertionError(f"WRONG: {len(gradients)} meta-gradients where there are {len(truth.gradients)}")
    apart = (gradients - truth.gradients).norm() / truth.gradients.norm()
    # Not max(): it may drop a NaN.
    return torch.stack([apart, torch.tensor(abs(loss - truth.loss) / abs(truth.loss))]).max().item()


def verified(
    network: Network, method: str, names: Sequence[str], truth: Truth, *, device: str = "cpu", **settings
) -> tuple[dict[str, Callable[[], object]], dict[str, Row]]:
    """What may be timed, in float32, and a row per contender: its errors, or why it may not.

    names: keys of `CONTENDERS[method]`
    settings: of `make_case`: tasks, steps, lr
    """
    functions, rows = {}, {}
    for name in names:
        row = rows[name] = {"contender": name, "status": "ok"}
        try:
            for dtype, allowed in ALLOWED.items():
                case = make_case(network, method, dtype=dtype, device=device, **settings)
                start = perf_counter()
                contender = CONTENDERS[method][name](case)
                loss = float(contender.run())
                row["first_run"] = perf_counter() - start
                error = error_of(loss, flat(contender.gradients()), truth)
                row[f"{dtype} error"] = finite(error)
                if not error <= allowed:
                    raise AssertionError(f"WRONG: {dtype} loss or meta-gradients are off by {error:.1e}")
            functions[name] = contender.run
        except Exception as error:  # whatever it is, it is the finding
            row["status"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return functions, rows


def finished(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call, of so many in a row, until a CUDA device too has finished them."""

    def all_done() -> None:
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wall_clock(all_done, 1) / calls


def measure(network: str, method: str, names: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """One row per contender: errors, times, the ratio to ours, memory."""
    settings = {"tasks": options.tasks, "steps": options.steps, "lr": options.lr}
    sizes = NETWORKS[network]
    truth = find_truth(sizes, method, **settings)
    functions, rows = verified(sizes, method, names, truth, device=options.device, **settings)
    timings = interleaved(functions, options.repeats, sample=rested(finished)) if functions else {}
    ours = next((timings[name].median for name in timings if name.startswith("ours")), None)
    for name, timing in timings.items():
        rows[name]["seconds"] = timing._asdict()
        rows[name]["over_ours"] = None if ours is None else timing.median / ours
        if options.memory:
            try:
                rows[name]["memory"] = peak_memory(sizes, method, name, options.device, **settings)
            except Exception as error:  # whatever it is, it is the finding
                rows[name]["memory"] = f"{type(error).__name__}: {error}"
    facts = {"network": network, "method": method, "convolution_flops": truth.flops, "truth": truth.checked}
    return [facts | row for row in rows.values()]


def show(rows: list[Row]) -> None:
    """Prints one table per network and method."""
    group = None
    for row in rows:
        if group != (row["network"], row["method"]):
            group = row["network"], row["method"]
            print(
                f"\n{row['network']} {row['method']}: {row['convolution_flops'] / 1e9:.2f} GFLOP of convolutions, "
                f"trusted gradients {row['truth']}\n"
                f"{'contender':20} {'median':>10} {'20 % .. 80 %':>22} {'over ours':>9} {'first run':>9} "
                f"{'peak':>8} {'working':>8}"
            )
        if "seconds" not in row:
            print(f"{row['contender']:20} {row['status']}", flush=True)
            continue
        seconds, memory = row["seconds"], row.get("memory", {})
        over = "" if row["over_ours"] is None else f"{row['over_ours']:.2f}"
        sizes = (
            memory
            if isinstance(memory, str)
            else " ".join(f"{memory[k] / 2**20:5.0f} MB" for k in memory if k != "first")
        )
        print(
            f"{row['contender']:20} {1e3 * seconds['median']:7.1f} ms {1e3 * seconds['low']:9.1f} .. "
            f"{1e3 * seconds['high']:9.1f} {over:>9} {row['first_run']:7.1f} s {sizes}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """1 if a contender of ours gave a wrong loss or wrong meta-gradients, else 0."""
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
            # After each table: what is measured is kept if a later one takes too long.
            if options.out:
                write_result(options.out, facts | {"rows": rows})
    return int(any("WRONG" in row["status"] for row in rows if row["contender"].startswith("ours")))


if __name__ == "__main__":
    raise SystemExit(main())
