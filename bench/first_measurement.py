"""The transform's three orders and one meta-iteration against learn2learn and plain torch, as ratios of one run.

    python bench/first_measurement.py --out bench/results/first_measurement.json

Every contender is checked against the others in float64 and in float32 before it is timed; a difference ends the run
without a number. Needs learn2learn (`make test` installs it) and the compiled library.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import meta_peers
import torch
from meta_case import NETWORKS

from kfo_ext.bench.cases import ORDERS, Case, random_case
from kfo_ext.bench.orders import Orders, error_of, truth
from kfo_ext.bench.providers import PROVIDERS
from kfo_ext.bench.timing import Timing, environment, interleaved
from kfo_ext.models import omniglot_cnn
from kfo_ext.transform import Problems, native

WAYS = 5
CONTENDERS = {
    "kfo packed": PROVIDERS["native"],
    "kfo lists": PROVIDERS["lists"],
    "torch matmul": PROVIDERS["torch-matmul"],
    "torch einsum": PROVIDERS["torch-einsum"],
    "learn2learn": PROVIDERS["learn2learn"],
}
Row = dict[str, object]


def rows_of(measurement: str, network: str, timings: dict[str, Timing]) -> list[Row]:
    """One line of results per contender; `ratios` holds its median over that of each of ours."""
    ours = {name: timing.median for name, timing in timings.items() if name.startswith("kfo")}
    return [
        {
            "measurement": measurement,
            "network": network,
            "contender": name,
            "seconds": timing._asdict(),
            "ratios": {other: timing.median / median for other, median in ours.items()},
        }
        for name, timing in timings.items()
    ]


def verify(providers: dict[str, Orders], case: Case, tolerance: float) -> None:
    """Compare every contender, order and output with float64 truth.

    tolerance: largest difference, relative to the largest magnitude of that output

    Raises:
        AssertionError: a contender computes something else; says which, and by how much.
    """
    expected = truth(case)
    for name, orders in providers.items():
        for order in ORDERS:
            error = error_of(CONTENDERS[name].pack, order, orders[order](), case, expected)
            if not error <= tolerance:
                raise AssertionError(f"{name}: {order} is off by {error:.2e}, allowed {tolerance:.0e}")


def measure_orders(layers: int, options: argparse.Namespace) -> list[Row]:
    """All providers on all orders, for the parameters of the Omniglot CNN with that many layers."""
    problems = Problems.of(omniglot_cnn(layers, WAYS).parameters())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        case = random_case(problems, options.tasks, dtype)
        providers = {name: provider.make(case) for name, provider in CONTENDERS.items()}
        verify(providers, case, tolerance)
    rows = []
    for order in ORDERS:
        timings = interleaved({name: orders[order] for name, orders in providers.items()}, options.repeats)
        rows += rows_of(order, f"CNN({layers})", timings)
    return rows


def measure_meta_iteration(layers: int, options: argparse.Namespace) -> list[Row]:
    """One meta-iteration of the Omniglot CNN with that many layers: 5-way 5-shot, factors adapted, psd."""
    network = replace(NETWORKS["omniglot_cnn2"], layers=layers)
    settings = {"tasks": options.tasks, "steps": options.steps, "lr": options.lr}
    truth = meta_peers.find_truth(network, "kfo", **settings)
    names = {"ours_native": "kfo", "learn2learn": "learn2learn"}
    functions, checked = meta_peers.verified(network, "kfo", list(names), truth, **settings)
    for name in names:
        if name not in functions:
            raise AssertionError(f"{name}: {checked[name]['status']}")
    timings = interleaved({names[name]: function for name, function in functions.items()}, options.meta_repeats)
    errors = {names[name]: row["torch.float32 error"] for name, row in checked.items()}
    rows = rows_of("meta_iteration", f"CNN({layers})", timings)
    return [entry | {"float32_error": errors[entry["contender"]]} for entry in rows]


def show(rows: list[Row]) -> None:
    print(
        f"{'measurement':16} {'network':8} {'contender':14} {'median':>12} {'20 % .. 80 %':>23}   times the median of"
    )
    for entry in rows:
        median, low, high, *_ = (1e6 * value for value in entry["seconds"].values())
        ratios = "   ".join(f"{name} {ratio:.2f}" for name, ratio in entry["ratios"].items())
        print(
            f"{entry['measurement']:16} {entry['network']:8} {entry['contender']:14} {median:9.0f} us"
            f" {low:10.0f} .. {high:9.0f}   {ratios}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="networks: Omniglot CNN(layers)")
    parser.add_argument("--tasks", type=int, default=16, help="tasks per meta-batch")
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument(
        "--lr", type=float, default=0.1, help="inner learning rate; bears on the checks, not on the time"
    )
    parser.add_argument("--repeats", type=int, default=41, help="rounds per order")
    parser.add_argument("--meta-repeats", type=int, default=11, help="rounds of the meta-iteration; 0 leaves it out")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    available, reason = native.status()["cpu"]
    if not available:
        parser.error(f"the compiled CPU library: {reason}")
    if options.threads:
        torch.set_num_threads(options.threads)

    rows = []
    for layers in options.layers:
        rows += measure_orders(layers, options)
        if options.meta_repeats:
            rows += measure_meta_iteration(layers, options)
    show(rows)
    if options.out:
        facts = environment() | {"backends": native.status(), "cpu_isa": native.cpu_isa()}
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts | {"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
