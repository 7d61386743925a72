"""Writes the measured tables of the pages anew, each from a committed result file.

python docs/make_tables.py

A page holds a table between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import accuracy_tables
import loss_tables
import readme_tables
import speed_tables
from measured import DOCS, NETWORKS, ROOT, by_contender, made, result, table

# Instruction sets, by torch's names.
INSTRUCTIONS = {"AVX512": "AVX-512", "AVX2": "AVX2"}
SLOT = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def routes() -> str:
    """A meta-iteration of a user's network by each route."""
    rows, captions = [], []
    for name in ("user_cnn", "user_cnn_avx2", "user_networks"):
        path = f"bench/results/{name}.json"
        facts, networks = by_contender(path)
        captions.append(made(path, facts))
        for network, found in networks.items():
            times = [found[name]["seconds"]["median"] * 1000 for name in ("ours_user", "ours_user_loop", "learn2learn")]
            shown = [f"{time:,.0f}" for time in times]
            rows.append([NETWORKS[network], INSTRUCTIONS[facts["capability"]], *shown, f"{times[2] / times[0]:.1f}x"])
    head = [
        "network of torch.nn modules",
        "instructions",
        "kfo_ext, vmap, ms",
        "kfo_ext, loop, ms",
        "learn2learn, ms",
        "speed-up of vmap over learn2learn",
    ]
    return table(head, rows, *captions)


def iteration() -> str:
    """A meta-iteration against learn2learn, with memory."""
    path = "bench/results/meta_peers.json"
    facts, networks = by_contender(path)
    of = facts["settings"]
    rows = []
    for network, found in networks.items():
        ours, theirs = found["ours_native"], found["learn2learn"]
        seconds = [row["seconds"]["median"] for row in (ours, theirs)]
        peaks = [row["memory"]["peak"] / 1e6 for row in (ours, theirs)]
        # learn2learn has one task in flight.
        working = [ours["memory"]["working"] / of["tasks"] / 1e6, theirs["memory"]["working"] / 1e6]
        rows.append(
            [
                NETWORKS[network],
                *(f"{1000 * time:,.0f}" for time in seconds),
                f"{seconds[1] / seconds[0]:.1f}x",
                *(f"{peak:,.0f}" for peak in (*peaks, *working)),
            ]
        )
    head = ["network", "kfo_ext, ms", "learn2learn, ms", "speed-up"]
    head += [
        f"{name}, {what}, MB" for what in ("peak memory", "memory per task") for name in ("kfo_ext", "learn2learn")
    ]
    note = f"{of['tasks']} tasks, {of['steps']} inner steps, adapted KFO, medians of {of['repeats']} repeats."
    return table(head, rows, made(path, facts, note))


def growth() -> str:
    """How time and memory of a meta-iteration grow."""
    rows, captions = [], []
    for path in ("bench/results/meta_cost.json", "bench/results/meta_cost_cifar_fs.json"):
        facts = result(path)
        captions.append(made(path, facts))
        for axis in facts["axes"]:
            powers = [f"{axis['exponents'][name]:.2f}" for name in ("seconds", "peak")]
            tenfold = ", ".join(f"{low} to {high}: {times:.1f}x" for low, high, times in axis["tenfold"]["seconds"])
            sizes = [point[axis["axis"]] for point in axis["points"]]
            span = f"{min(sizes)} to {max(sizes)}"
            rows.append([NETWORKS[facts["settings"]["network"]], f"{axis['axis']}, {span}", *powers, tenfold])
    head = ["network", "size", "exponent of time", "exponent of peak memory", "time of ten times the size"]
    return table(head, rows, *captions)


def precision() -> str:
    """What bf16 does to meta-gradients."""
    path = "bench/results/precision.json"
    facts = result(path)
    rows = [
        [row["method"], row["option"], f"{row['gradients error']:.1e}", f"{1000 * row['seconds']['median']:.0f}"]
        for row in facts["rows"]
        if row["status"] == "ok"
    ]
    head = ["method", "precision", "relative error of the meta-gradients", "time, ms"]
    return table(head, rows, made(path, facts, f"{facts['settings']['steps']} inner steps."))


def stages() -> str:
    """Where the time of a meta-iteration goes."""
    path = "bench/results/meta_profile.json"
    facts = result(path)
    (profile,) = facts["profiles"]
    rows = [
        [stage["stage"], f"{1000 * stage['host']:.1f}", f"{100 * stage['host'] / profile['wall']:.0f} %"]
        for stage in profile["stages"]
    ]
    return table(["stage", "time, ms", "share"], rows, made(path, facts, NETWORKS[profile["network"]] + "."))


def pieces() -> str:
    """What a CPU kernel's parts reach of the multiply-add peak."""
    path = "bench/results/cpu_pieces.json"
    facts = result(path)
    rows = []
    for case in facts["cases"]:
        for piece in case["pieces"]:
            whole = piece["piece"] in ("forward", "backward", "double backward") or case["name"].startswith("Conv")
            if piece["share_of_peak"] != 1.0 and (whole or case is facts["cases"][0]):
                rate = f"{piece['gflop_per_s']:.0f}" if piece["gflop_per_s"] else "moves data only"
                share = f"{piece['share_of_peak']:.2f}" if piece["gflop_per_s"] else ""
                rows.append([case["name"], piece["piece"], f"{piece['microseconds']:.2f}", rate, share])
    head = ["case", "piece", "time, us", "GFLOP/s", "share of the multiply-add peak"]
    of = facts["settings"]
    return table(head, rows, made(path, facts, f"{of['isa']}, one thread, least of {of['rounds']} rounds."))


TABLES: dict[str, Callable[[], str]] = {
    **speed_tables.TABLES,
    **loss_tables.TABLES,
    **accuracy_tables.TABLES,
    **readme_tables.TABLES,
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
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = path.read_text()
        if SLOT.search(text):
            found[path] = SLOT.sub(lambda slot: f"{slot[1]}\n{TABLES[slot[2]]()}\n{slot[3]}", text)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
