"""Where something else is faster than kfo_ext, or takes less memory: every such row of the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from measured import METHODS, NETWORKS, PEERS, ROOT, Row, comparisons, made, result, table
from speed_tables import BENCH, CPU_TARGETS, same_point

from bench.cpu_target_run import PLAIN_TORCH
from kfo_ext.bench import report

FORMS = {
    "native": "packed",
    "lists": "G and factors as lists",
    "gradient-lists": "G as lists",
    "reference": '`backend="reference"`',
    "ours": "MAML",
    "ours_native": "MAML, a network of this package",
    "ours_user": "MAML, `vmap`",
    "ours_user_loop": "MAML, `loop`",
}


class Compared(NamedTuple):
    """Something of kfo_ext beside the best of what else there is.

    where: what was measured.
    form: of kfo_ext.
    other: who else.
    ours, theirs: time or memory, with its unit.
    ratio: theirs over ours; below 1 kfo_ext loses.
    path: of the result.
    """

    where: str
    form: str
    other: str
    ours: str
    theirs: str
    ratio: float
    path: str


def losses(compared: Iterable[Compared]) -> list[Compared]:
    """Those in which kfo_ext loses, the worst first."""
    return sorted((each for each in compared if each.ratio < 1), key=lambda each: each.ratio)


def _text(seconds: float) -> str:
    return report.seconds_text(seconds)


def iterations() -> Iterator[Compared]:
    """Time of each meta-iteration beside each other package in the same result."""
    for each in comparisons():
        times = [row["seconds"]["median"] for row in (each.ours, each.theirs)]
        yield _meta(each.ours, each.theirs, f"{PEERS[each.peer]}", *map(_text, times), each.ratio, each.path)
    path = "bench/results/torch_func.json"
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result(path)["rows"]:
        found.setdefault((row["network"], row["method"]), {})[row["contender"]] = row
    for rows in found.values():
        ours, theirs = rows["torch_func_ours"], rows["torch_func"]
        times = [row["seconds"]["median"] for row in (ours, theirs)]
        yield _meta(ours, theirs, "torch.func", *map(_text, times), times[1] / times[0], path)


def memory() -> Iterator[Compared]:
    """Peak memory of each meta-iteration beside each other package in the same result."""
    for each in comparisons():
        found = [row.get("memory") for row in (each.ours, each.theirs)]
        # In place of a memory that could not be measured stands why.
        if all(isinstance(numbers, dict) for numbers in found):
            ours, theirs = (numbers["peak"] for numbers in found)
            texts = [f"{peak / 1e6:,.0f} MB" for peak in (ours, theirs)]
            yield _meta(each.ours, each.theirs, PEERS[each.peer], *texts, theirs / ours, each.path)


def _meta(ours: Row, theirs: Row, other: str, our_text: str, their_text: str, ratio: float, path: str) -> Compared:
    where = f"{NETWORKS[ours['network']]}, {METHODS[ours['method']]}"
    form = FORMS.get(ours["contender"], ours["contender"])
    return Compared(where, form, other, our_text, their_text, ratio, path)


def transforms() -> Iterator[Compared]:
    """Each order of the transform, compiled, beside the fastest of the others."""
    yield from _points(("native", "lists"))
    for path in CPU_TARGETS:
        found: dict[tuple[str, str], dict[str, float]] = {}
        for row in (row for row in result(path)["rows"] if "seconds" in row):
            found.setdefault((row["group"], row["order"]), {})[row["contender"]] = row["seconds"]["median"]
        for (group, order), seconds in found.items():
            best = min((name for name in (*PLAIN_TORCH, "learn2learn") if name in seconds), key=seconds.__getitem__)
            for form in ("native", "gradient-lists", "lists"):
                if form in seconds:
                    times = seconds[form], seconds[best]
                    where = f"{group}, {order.replace('_', ' ')}"
                    yield Compared(where, FORMS[form], best, *map(_text, times), times[1] / times[0], path)


def references() -> Iterator[Compared]:
    """The plain-PyTorch backend beside the fastest of the others."""
    yield from _points(("reference",))


def _points(providers: tuple[str, ...]) -> Iterator[Compared]:
    facts = report.read(ROOT / BENCH)
    assert facts is not None
    rows = [row for row in facts["rows"] if row["provider"] in providers and row["best_other"]]
    for row in {same_point(row): row for row in rows}.values():
        size = f"{row['x']} x {row['x']}" if row["axis"] == "width" else f"{row['axis']} = {row['x']}, {row['group']}"
        where = f"{size}, {row['order'].replace('_', ' ')}"
        ratio = row["other_over_this"]
        times = _text(row["median_s"]), _text(row["median_s"] * ratio)
        yield Compared(where, FORMS[row["provider"]], row["best_other"], *times, ratio, BENCH)


def convolutions() -> Iterator[Compared]:
    """Each layer and order of a convolution beside the fastest formulation in PyTorch."""
    path = "bench/results/conv_forms.json"
    for network in result(path)["networks"]:
        found: dict[tuple[object, ...], dict[str, float]] = {}
        for row in network["rows"]:
            if row["status"] == "ok":
                key = row["layer"], row["sizes"], row["order"]
                found.setdefault(key, {})[row["contender"]] = row["seconds"]["median"]
        for (layer, sizes, order), seconds in found.items():
            best = min((name for name in seconds if not name.startswith("ours")), key=seconds.__getitem__)
            times = seconds["ours"], seconds[best]
            where = f"{NETWORKS[network['network']]}, layer {layer} ({sizes}), {str(order).replace('_', ' ')}"
            yield Compared(where, "conv2d", best, *map(_text, times), times[1] / times[0], path)


def _shown(compared: Callable[[], Iterable[Compared]]) -> str:
    """A table of the losses among them."""
    every = list(compared())
    lost = losses(every)
    rows = [[*each[:5], f"{each.ratio:.2f}", f"`{each.path.rpartition('/')[2]}`"] for each in lost]
    head = ["where", "kfo_ext", "faster or smaller", "kfo_ext's", "the other's", "ratio", "result"]
    files = {each.path: json.loads((ROOT / each.path).read_text()) for each in lost}
    counted = f"{len(lost)} of {len(every)} comparisons."
    return table(head, rows, counted, *(made(path, facts) for path, facts in files.items()))


TABLES: dict[str, Callable[[], str]] = {
    "lost-iterations": lambda: _shown(iterations),
    "lost-memory": lambda: _shown(memory),
    "lost-packed": lambda: _shown(lambda: (each for each in transforms() if each.form == FORMS["native"])),
    "lost-lists": lambda: _shown(lambda: (each for each in transforms() if each.form != FORMS["native"])),
    "lost-references": lambda: _shown(references),
    "lost-convolutions": lambda: _shown(convolutions),
}
