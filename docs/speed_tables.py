"""The tables of results/speed.md beside those of make_tables.py: other packages, loops, the operator, and cost."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from measured import METHODS, NETWORKS, PEERS, ROOT, Row, made, newest, result, table

from bench.cpu_target_lines import best_of_torch, ratio, target_lines
from bench.cpu_target_run import EMPTY, FMA
from bench.cpu_target_run import NETWORKS as GROUPS
from kfo_ext.bench import report
from kfo_ext.bench.cases import ORDERS
from kfo_ext.bench.names import AXES
from kfo_ext.bench.rows import loses

LOOPS = {
    "learn2learn": "`GBML` of learn2learn",
    "learn2learn_fast_layers": "`GBML` of learn2learn, in `fast_layers`",
    "our_gbml": "`GBML` of kfo_ext",
    "our_gbml_fast_layers": "`GBML` of kfo_ext in `fast_layers`",
    "learn2learn_our_kfo": "`GBML` of learn2learn, with `KFO`",
    "learn2learn_our_kfo_fast_layers": "`GBML` of learn2learn, with `KFO`, in `fast_layers`",
    "by_hand": "a loop with `KFO` and `torch.autograd.grad`",
    "by_hand_fast_layers": "a loop with `KFO` and `torch.autograd.grad`, in `fast_layers`",
    "by_step": "a loop with `KFO.step`",
    "by_step_fast_layers": "a loop with `KFO.step`, in `fast_layers`",
    "ours_native": "`MAML`, all tasks at once",
}
# What bench/cpu_target_lines.py calls a target, and what it is.
TARGETS = {
    "lists in and out, factors packed as in KFO, against learn2learn's loop": "speed-up over learn2learn, G as lists",
    "lists in and out, factors too, against learn2learn's loop": "speed-up over learn2learn, G and factors as lists",
    "packed, against the best plain torch": "speed-up over the fastest plain PyTorch, packed",
    "share of the FMA floor": "share of the multiply-add peak",
    "host time of one call, gradients on": "host time of a call with autograd",
}
# A result of `kfo bench`, and those of bench/cpu_targets.py.
BENCH = "bench/results/transform_cpu.json"
CPU_TARGETS = ("bench/results/cpu_targets.json", "bench/results/cpu_targets_epyc.json")


def ms(row: Row, digits: int = 0) -> str:
    """The median time of a row, in milliseconds."""
    return f"{1000 * row['seconds']['median']:,.{digits}f}"


def peers() -> str:
    """A meta-iteration against every other package, each from the newest result that has both."""
    found = newest()
    rows = [
        [
            METHODS[each.ours["method"]],
            f"{PEERS[each.peer]}{_form(each.theirs['contender'])}",
            ms(each.ours),
            ms(each.theirs),
            f"{each.ratio:.1f}x",
            f"`{each.path.rpartition('/')[2]}`",
        ]
        for each in found
    ]
    files = {each.path: each.facts for each in found}
    captions = [
        made(path, facts, f"Medians of {facts['settings']['repeats']} repeats.") for path, facts in files.items()
    ]
    return table(["method", "package", "kfo_ext, ms", "package, ms", "speed-up", "result"], rows, *captions)


def _form(contender: str) -> str:
    return f" (`{contender.removeprefix('jax_')}`)" if contender.startswith("jax") else ""


def loops() -> str:
    """A meta-iteration in a loop of the user's own or of learn2learn."""
    path = "bench/results/meta_peers_loops.json"
    facts = result(path)
    timed = {row["contender"]: row for row in facts["rows"] if row["status"] == "ok"}
    base = timed["learn2learn"]["seconds"]["median"]
    rows = [
        [text, ms(timed[name]), f"{base / timed[name]['seconds']['median']:.1f}x", _mb(timed[name])]
        for name, text in LOOPS.items()
        if name in timed
    ]
    of = facts["settings"]
    note = f"{NETWORKS[of['networks'][0]]}, {of['tasks']} tasks, {of['steps']} inner steps, KFO with adapted factors."
    head = ["loop", "time, ms", "speed-up over learn2learn", "peak memory, MB"]
    return table(head, rows, made(path, facts, note))


def _mb(row: Row) -> str:
    return f"{row['memory']['peak'] / 1e6:,.0f}"


def torch_func() -> str:
    """A meta-iteration written with torch.func, with torch's operations and with those of kfo_ext."""
    path = "bench/results/torch_func.json"
    facts = result(path)
    timed = {(row["method"], row["contender"]): row for row in facts["rows"]}
    rows = []
    for method in facts["settings"]["methods"]:
        plain, fast = timed[method, "torch_func"], timed[method, "torch_func_ours"]
        speed_up = plain["seconds"]["median"] / fast["seconds"]["median"]
        rows.append([METHODS[method], ms(plain), ms(fast), f"{speed_up:.1f}x"])
    head = ["method", "operations of PyTorch, ms", "operations of kfo_ext, ms", "speed-up"]
    note = f"{NETWORKS[facts['settings']['networks'][0]]}, `vmap` of `grad` over {facts['settings']['tasks']} tasks."
    return table(head, rows, made(path, facts, note))


def orders() -> str:
    """The three orders of the transform, of the paper's Omniglot networks."""
    rows, captions = [], []
    for path in CPU_TARGETS:
        facts = result(path)
        peak = facts["fma_gflop_per_s"]
        peaks = peak if isinstance(peak, list) else [peak]
        captions.append(made(path, facts, f"{facts['cpu_isa']}, medians of {facts['settings']['repeats']} repeats."))
        for group in GROUPS:
            for order in ORDERS:
                cells = _order([r for r in facts["rows"] if (r["group"], r["order"]) == (group, order)], peaks)
                rows.append([facts["processor"], f"{group}, {order.replace('_', ' ')}", *cells])
    head = [
        "processor",
        "network, order",
        "kfo_ext, packed, us",
        "share of the multiply-add peak",
        "learn2learn, us",
        "speed-up",
        "fastest plain PyTorch, us",
        "speed-up",
        "kfo_ext, lists, us",
        "speed-up over learn2learn",
    ]
    return table(head, rows, *captions)


def _order(found: list[Row], peaks: list[float]) -> list[str]:
    """The cells of one order of one network.

    Args:
        found: the rows of its contenders.
        peaks: peak rate of multiply-adds in GFLOP/s, one per round, used if the rows hold no measurement of it.

    Returns:
        One text per column of the table.
    """
    # A contender that could not run has a reason in place of its seconds.
    timed = [row for row in found if "seconds" in row]
    seconds = {row["contender"]: row.get("runs", [row["seconds"]["median"]]) for row in timed}
    (flops,) = {row["flops"] for row in timed if row["contender"] != FMA}
    if FMA in seconds:
        (operations,) = (row["flops"] for row in found if row["contender"] == FMA)
        peaks = [operations / each / 1e9 for each in seconds[FMA]]
    ours, best = seconds["native"], best_of_torch(seconds)
    # An older result has no form with gradients alone as lists.
    lists = seconds.get("gradient-lists")
    us = {name: f"{1e6 * median(numbers):,.0f}" for name, numbers in seconds.items()}
    return [
        us["native"],
        f"{median(ratio([flops / peak / 1e9 for peak in peaks], ours)):.2f}",
        us["learn2learn"],
        f"{median(ratio(seconds['learn2learn'], ours)):.0f}x",
        f"{us[best]} ({best.removeprefix('torch-')})",
        f"{median(ratio(seconds[best], ours)):.1f}x",
        us["gradient-lists"] if lists else "",
        f"{median(ratio(seconds['learn2learn'], lists)):.0f}x" if lists else "",
    ]


def axes() -> str:
    """Along each axis of `kfo bench`, how often kfo_ext is faster than everything else."""
    facts = report.read(ROOT / BENCH)
    assert facts is not None
    rows = []
    for provider, name in (("native", "packed"), ("lists", "G and factors as lists")):
        timed = [row for row in facts["rows"] if row["provider"] == provider and row["best_other"]]
        for axis, text in AXES.items():
            found = [row for row in timed if row["axis"] == axis]
            if found:
                ratios = [row["other_over_this"] for row in found]
                won = sum(not loses(row) for row in found)
                span = f"{min(row['x'] for row in found)} to {max(row['x'] for row in found)}"
                rows.append(
                    [name, f"{text}: {span}", f"{won} of {len(found)}", f"{min(ratios):.2f}x to {max(ratios):.1f}x"]
                )
        once = list({same_point(row): row for row in timed}.values())
        rows.append([name, "all, each point once", f"{sum(not loses(row) for row in once)} of {len(once)}", ""])
    head = ["kfo_ext", "axis", "faster than every other", "time of the fastest other / kfo_ext"]
    return table(head, rows, made(BENCH, facts))


def same_point(row: Row) -> tuple[object, ...]:
    """What rows of one measurement share, which may lie on several axes."""
    keys = ("group", "tasks", "psd", "hidden", "flops", "order", "provider", "mode")
    # Along these the update is a rule, not the transform alone.
    return (row["axis"] in ("hidden", "psd"), *(row[key] for key in keys))


def convolutions() -> str:
    """All layers and orders of a network's convolutions, against the best formulation in PyTorch."""
    path = "bench/results/conv_forms.json"
    facts = result(path)
    rows = []
    for network in facts["networks"]:
        sums: dict[str, float] = {}
        for row in network["rows"]:
            if row["status"] == "ok":
                sums[row["contender"]] = sums.get(row["contender"], 0.0) + row["seconds"]["median"]
        ours = sums.pop("ours")
        best = min((name for name in sums if not name.startswith("ours")), key=sums.__getitem__)
        cells = [f"{1000 * ours:.1f}", f"{1000 * sums[best]:.1f} (`{best}`)", f"{sums[best] / ours:.2f}x"]
        rows.append([NETWORKS[network["network"]], *cells])
    head = ["network", "kfo_ext, ms", "best formulation in PyTorch, ms", "speed-up"]
    note = "Sums over layers and orders. `bench/results/conv_forms.md` describes the formulations, layer by layer."
    return table(head, rows, made(path, facts, note))


def data() -> str:
    """What it costs to draw a meta-batch."""
    path = "bench/results/data_cost.json"
    facts = result(path)
    names = {
        "draw": "draw the examples of a meta-batch",
        "batch": "assemble its tensors",
        "sample": "both",
        "iteration": "meta-iteration on a batch in memory",
    }
    rows = []
    for name, timing in facts["timings"].items():
        text = names.get(name, name.replace("stream, workers", "meta-iteration with its data, `--workers`"))
        rows.append([text, f"{1000 * timing['median']:,.2f}"])
    return table(["part", "time, ms"], rows, made(path, facts, f"{NETWORKS[facts['settings']['network']]}."))


def methods() -> str:
    """The time and memory of every method, beside MAML's."""
    path = "bench/results/method_cost.json"
    facts = result(path)
    (base,) = (row["memory"]["peak"] for row in facts["rows"] if row["method"] == "MAML")
    rows = []
    for row in facts["rows"]:
        share = row["memory"]["peak"] / base
        rows.append([row["method"], ms(row), f"{row['over_maml']:.2f}", _mb(row), f"{share:.2f}"])
    head = ["method", "time, ms", "time / MAML's", "peak memory, MB", "memory / MAML's"]
    of = facts["settings"]
    note = f"CNN({of['layers']}), Omniglot, {of['tasks']} tasks, {of['steps']} inner steps, with Adam's step."
    return table(head, rows, made(path, facts, note))


def host() -> str:
    """The fixed cost of a call in Python and autograd."""
    rows, captions = [], []
    for path in CPU_TARGETS:
        facts = result(path)
        captions.append(made(path, facts))
        times = {row["order"]: f"{1e6 * row['seconds']['median']:.1f}" for row in facts["host"]}
        rows.append([facts["processor"], *(times[order] for order in (*ORDERS, EMPTY))])
    head = ["processor", "forward, us", "backward, us", "double backward, us", "empty autograd Function, us"]
    return table(head, rows, *captions)


def missed() -> str:
    """The targets that the newest measurement misses."""
    path = CPU_TARGETS[0]
    facts = result(path)
    rows = []
    for line in target_lines(facts):
        if line.holds is False:
            name, _, required = line.target.rpartition(": ")
            where = line.where.replace("_", " ")
            rows.append(
                [TARGETS.get(name, name), where, required, line.measured, line.bound.replace("FMA", "multiply-add")]
            )
    head = ["target", "order, network", "required", "measured (range over processes)", "what bounds it"]
    return table(head, rows, made(path, facts))


TABLES: dict[str, Callable[[], str]] = {
    "peers": peers,
    "loops": loops,
    "torch-func": torch_func,
    "orders": orders,
    "axes": axes,
    "convolutions": convolutions,
    "data": data,
    "methods": methods,
    "host": host,
    "missed": missed,
}
