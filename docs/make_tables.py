"""Writes the measured tables of the pages anew, each from a committed result file.

python docs/make_tables.py

A page holds a table between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SLOT = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
NETWORKS = {
    "omniglot_cnn2": "CNN(2), Omniglot",
    "omniglot_cnn4": "CNN(4), Omniglot",
    "cifar_fs_cnn2": "CNN(2), 3 x 32 x 32 images",
    "user_resnet12": "narrow ResNet-12, max pooling",
    "user_mlp": "four linear layers, layer norm",
}


def _result(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + f"\n\n{caption}\n"


def _made(path: str, facts: dict[str, Any], notes: str = "") -> str:
    """Where a table comes from: file, command, machine."""
    folder = "experiments" if path.startswith("experiments") else "bench"
    command = re.sub(r"--data-root \S+", "--data-root DATA/omniglot", f"{folder}/{facts['command']}")
    commit = (facts["commit"] or "unknown")[:12]
    machine = f"{facts['processor']}, torch {facts['torch']}, commit {commit}"
    return f"`{path}`: `python {command}`, {machine}. {notes}".strip()


def accuracy() -> str:
    """MAML and KFO on Omniglot, tuned by one rule."""
    path = "experiments/results/omniglot_cnn2.json"
    result = _result(path)
    rows = []
    for name, run in result["finals"].items():
        gap = ""
        if "kfo_minus_this" in run:
            gap = f"{100 * run['kfo_minus_this']:.1f} ± {100 * run['kfo_minus_this_interval']:.1f}"
        score = f"{100 * run['accuracy']:.1f} ± {100 * run['interval']:.1f}"
        label = f"{run['method']}, {'at the rate of the paper' if name.endswith('paper') else 'tuned'}"
        rows.append([label, f"{run['inner_rate']}", run["init"], score, f"{100 * run['paper']:.1f}", gap])
    head = [
        "method",
        "inner rate",
        "start of the network",
        "accuracy, %",
        "the paper, %",
        "KFO minus this, paired, points",
    ]
    note = f"{result['what']}; {result['iterations']:,} meta-iterations, one seed."
    return _table(head, rows, _made(path, result["environment"], note))


def grid() -> str:
    """Validation accuracy over inner rates."""
    path = "experiments/results/omniglot_cnn2.json"
    result = _result(path)
    rows = []
    for method, trials in result["validation_accuracy_of_tuning"].items():
        for init in dict.fromkeys(trial["init"] for trial in trials):
            cells = [f"{t['rate']}: {100 * t['accuracy']:.0f}" for t in trials if t["init"] == init]
            rows.append([method, init, ", ".join(cells)])
    note = f"{result['tuning_iterations']} meta-iterations each."
    return _table(
        ["method", "start of the network", "inner rate: validation accuracy, %"],
        rows,
        _made(path, result["environment"], note),
    )


def _by_contender(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    result = _result(path)
    networks: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        networks.setdefault(row["network"], {})[row["contender"]] = row
    return result, networks


def routes() -> str:
    """A meta-iteration of a user's network by each route."""
    rows, made = [], []
    for path in ("bench/results/user_cnn.json", "bench/results/user_networks.json"):
        result, networks = _by_contender(path)
        made.append(_made(path, result))
        for network, found in networks.items():
            times = [found[name]["seconds"]["median"] * 1000 for name in ("ours_user", "ours_user_loop", "learn2learn")]
            rows.append([NETWORKS[network], *(f"{time:,.0f}" for time in times), f"{times[2] / times[0]:.1f}x"])
    head = [
        "network of torch.nn modules",
        "kfo_ext, vmap, ms",
        "kfo_ext, loop, ms",
        "learn2learn, ms",
        "speed-up of vmap over learn2learn",
    ]
    return _table(head, rows, " ".join(made))


def iteration() -> str:
    """A meta-iteration against learn2learn, with memory."""
    path = "bench/results/meta_peers.json"
    result, networks = _by_contender(path)
    rows = []
    for network, found in networks.items():
        ours, theirs = found["ours_native"], found["learn2learn"]
        seconds = [row["seconds"]["median"] for row in (ours, theirs)]
        peaks = [row["memory"]["peak"] / 1e6 for row in (ours, theirs)]
        rows.append(
            [
                NETWORKS[network],
                *(f"{1000 * time:,.0f}" for time in seconds),
                f"{seconds[1] / seconds[0]:.1f}x",
                *(f"{peak:,.0f}" for peak in peaks),
            ]
        )
    head = [
        "network",
        "kfo_ext, ms",
        "learn2learn, ms",
        "speed-up",
        "kfo_ext, peak memory, MB",
        "learn2learn, peak memory, MB",
    ]
    of = result["settings"]
    note = f"{of['tasks']} tasks, {of['steps']} inner steps, adapted KFO, medians of {of['repeats']} repeats."
    return _table(head, rows, _made(path, result, note))


def growth() -> str:
    """How time and memory of a meta-iteration grow."""
    rows, made = [], []
    for path in ("bench/results/meta_cost.json", "bench/results/meta_cost_cifar_fs.json"):
        result = _result(path)
        made.append(_made(path, result))
        for axis in result["axes"]:
            powers = [f"{axis['exponents'][name]:.2f}" for name in ("seconds", "peak")]
            rows.append([NETWORKS[result["settings"]["network"]], axis["axis"], *powers])
    head = ["network", "size", "exponent of time", "exponent of peak memory"]
    return _table(head, rows, " ".join(made))


def precision() -> str:
    """What bf16 does to meta-gradients."""
    path = "bench/results/precision.json"
    result = _result(path)
    rows = [
        [row["method"], row["option"], f"{row['gradients error']:.1e}", f"{1000 * row['seconds']['median']:.0f}"]
        for row in result["rows"]
        if row["status"] == "ok"
    ]
    head = ["method", "precision", "relative error of the meta-gradients", "time, ms"]
    return _table(head, rows, _made(path, result, f"{result['settings']['steps']} inner steps."))


def stages() -> str:
    """Where the time of a meta-iteration goes."""
    path = "bench/results/meta_profile.json"
    result = _result(path)
    (profile,) = result["profiles"]
    rows = [
        [stage["stage"], f"{1000 * stage['host']:.1f}", f"{100 * stage['host'] / profile['wall']:.0f} %"]
        for stage in profile["stages"]
    ]
    return _table(["stage", "time, ms", "share"], rows, _made(path, result, NETWORKS[profile["network"]] + "."))


def pieces() -> str:
    """What a CPU kernel's parts reach of the multiply-add peak."""
    path = "bench/results/cpu_pieces.json"
    result = _result(path)
    rows = []
    for case in result["cases"]:
        for piece in case["pieces"]:
            whole = piece["piece"] in ("forward", "backward", "double backward") or case["name"].startswith("Conv")
            if piece["share_of_peak"] != 1.0 and (whole or case is result["cases"][0]):
                rate = f"{piece['gflop_per_s']:.0f}" if piece["gflop_per_s"] else "moves data only"
                share = f"{piece['share_of_peak']:.2f}" if piece["gflop_per_s"] else ""
                rows.append([case["name"], piece["piece"], f"{piece['microseconds']:.2f}", rate, share])
    head = ["case", "piece", "time, us", "GFLOP/s", "share of the multiply-add peak"]
    of = result["settings"]
    return _table(head, rows, _made(path, result, f"{of['isa']}, one thread, least of {of['rounds']} rounds."))


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "grid": grid,
    "routes": routes,
    "iteration": iteration,
    "growth": growth,
    "precision": precision,
    "stages": stages,
    "pieces": pieces,
}


def pages() -> dict[Path, str]:
    """Every page that holds a table, with its text as it should be."""
    found = {}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        if SLOT.search(text):
            found[path] = SLOT.sub(lambda slot: f"{slot[1]}\n{TABLES[slot[2]]()}\n{slot[3]}", text)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
