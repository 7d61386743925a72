"""The accuracy and time of a meta-iteration of CNN(2) under the options of the network's convolutions.

    python bench/precision.py --device cuda --out precision.json
    python bench/precision.py --quick        a small network: exercises the code

For every option of `kfo train` on the device (`--precision`, `--channels-last`), with and without KFO, it reports the
relative errors of the loss and of all meta-gradients as one vector, against the same iteration in float64, and medians
of interleaved runs. An option without effect on the device gets a row with the reason.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from bench.meta_case import METHODS, NETWORKS, Network, flat, make_case
from bench.meta_ours import OursAtPrecision
from bench.meta_truth import Row, kept_truth
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.result import facts_of, finite, write_result
from kfo_ext.bench.timing import interleaved
from kfo_ext.ops import library
from kfo_ext.trainer import Config
from kfo_ext.trainer.precision import PRECISIONS

QUICK = Network(2, in_channels=1, image_size=12, stride=2, hidden=8)


def measure(network: Network, method: str, options: argparse.Namespace) -> list[Row]:
    """One row per option: errors and time, or the reason for none."""
    settings = {"tasks": options.tasks, "steps": options.steps, "lr": options.lr}
    truth = kept_truth(options.truths, network, method, **settings)
    case = make_case(network, method, device=options.device, **settings)
    rows: dict[str, Row] = {}
    functions: dict[str, Callable[[], object]] = {}
    for precision, channels_last in itertools.product(PRECISIONS, (False, True)):
        name = f"{precision}, channels last" if channels_last else precision
        row = rows[name] = {"method": method, "option": name, "status": "ok"}
        try:
            Config(device=options.device, precision=precision, channels_last=channels_last)
        except ValueError as error:
            row["status"] = f"left out: {error}"
            continue
        ours = OursAtPrecision(case, precision, channels_last)
        row["loss error"] = finite(abs(float(ours.run()) - truth.loss) / abs(truth.loss))
        apart = (flat(ours.gradients()) - truth.gradients).norm() / truth.gradients.norm()
        row["gradients error"] = finite(apart.item())
        functions[name] = ours.run
    for name, timing in interleaved(functions, options.repeats, sample=finished).items():
        rows[name]["seconds"] = timing._asdict()
    return list(rows.values())


def show(rows: list[Row]) -> None:
    """Print one table."""
    print(f"{'method':6} {'option':20} {'gradients':>10} {'loss':>10} {'median':>10}")
    for row in rows:
        start = f"{row['method']:6} {row['option']:20}"
        if "seconds" in row:
            errors = f"{row['gradients error']:10.1e} {row['loss error']:10.1e}"
            print(f"{start} {errors} {1e3 * row['seconds']['median']:7.1f} ms")
        else:
            print(f"{start} {row['status']}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if plain float32 is farther from float64 than rounding explains, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="omniglot_cnn2")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--lr", type=float, default=0.1, help="inner learning rate")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small network, few tasks, steps and repeats")
    parser.add_argument("--truths", type=Path, help="folder that keeps trusted gradients, for this code and machine")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    network = NETWORKS[options.network]
    if options.quick:
        network, options.tasks, options.steps, options.repeats = QUICK, 2, 2, 2
    # The options set the switch of the convolutions.
    torch.backends.cuda.matmul.allow_tf32 = False
    facts = facts_of(options) | {"backends": library.status()}
    rows = [row for method in METHODS for row in measure(network, method, options)]
    show(rows)
    if options.out:
        write_result(options.out, facts | {"rows": rows})
    # A ReLU at its kink may fall to either side: see `meta_truth.ALLOWED`.
    errors = [row["gradients error"] for row in rows if row["option"] == "ieee"]
    return int(any(error is None or error >= 0.1 for error in errors))


if __name__ == "__main__":
    raise SystemExit(main())
