"""Committed result files as pages show them: reading one, a table of it, and where its numbers come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kfo_ext.bench.result import provenance

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = ROOT / "bench" / "results"
NETWORKS = {
    "omniglot_cnn2": "CNN(2), Omniglot",
    "omniglot_cnn4": "CNN(4), Omniglot",
    "cifar_fs_cnn2": "CNN(2), 3 x 32 x 32 images",
    "user_resnet12": "narrow ResNet-12, max pooling",
    "user_mlp": "four linear layers, layer norm",
}
METHODS = {"kfo": "META-KFO", "maml": "MAML"}
# Packages by their key in a result file, which is also how the names of their contenders begin.
PEERS = {
    "learn2learn": "learn2learn",
    "torchopt": "TorchOpt",
    "higher": "higher",
    "jax": "JAX",
    "torch_func": "torch.func",
}
# Loops of these packages that already run on a part of kfo_ext.
MIXED = ("_our_kfo", "_fast_layers", "_ours")
Row = dict[str, Any]


def result(path: str) -> Row:
    """A result file, by its path from the root of the repository."""
    return json.loads((ROOT / path).read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *captions: str) -> str:
    """A table in Markdown with its captions below; "None." in place of a table without rows."""
    body = list(rows)
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    below = captions if len(captions) == 1 else [f"- {caption}" for caption in captions]
    return "\n".join([*(lines if body else ["None."]), "", *below, ""])


def made(path: str, facts: Row, notes: str = "") -> str:
    """Where a table comes from: file, command, machine, versions, commit."""
    folder = "experiments" if path.startswith("experiments") else "bench"
    command = re.sub(r"--data-root \S+", "--data-root DATA/omniglot", f"python {folder}/{facts['command']}")
    command = re.sub(r"--out \S*/(\S+)\.json", rf"--out {Path(path).parent}/\1.json", command)
    command = command.replace("python bench/cli.py", "kfo")
    threads = f", {facts['torch_threads']} threads" if "torch_threads" in facts else ""
    versions = "".join(f", {PEERS[name]} {facts[name]}" for name in _packages(facts))
    machine = f"{facts['processor']}{threads}, Python {facts['python']}, torch {facts['torch']}{versions}"
    return f"`{path}`: `{command}`, {machine}, {provenance(facts)}. {notes}".strip()


def _packages(facts: Row) -> list[str]:
    """The packages whose versions matter: those that the result measures."""
    rows = [row if isinstance(row, dict) else dict(zip(facts["columns"], row)) for row in facts.get("rows", [])]
    names = [str(row.get("contender") or row.get("provider")) for row in rows if row.get("status", "ok") == "ok"]
    return [peer for peer in PEERS if facts.get(peer) and any(name.startswith(peer) for name in names)]


def by_contender(path: str) -> tuple[Row, dict[str, dict[str, Row]]]:
    """A result of bench/meta_peers.py, and its rows by network and contender."""
    found = result(path)
    networks: dict[str, dict[str, Row]] = {}
    for row in found["rows"]:
        networks.setdefault(row["network"], {})[row["contender"]] = row
    return found, networks


def peer_of(contender: str) -> str | None:
    """The package that a contender is, by its key; None for one that runs on kfo_ext."""
    if contender.endswith(MIXED):
        return None
    return next((peer for peer in PEERS if contender.startswith(peer)), None)


class Against(NamedTuple):
    """A meta-iteration of kfo_ext beside that of another package, from one result.

    ours, theirs: rows of the result.
    """

    path: str
    facts: Row
    peer: str
    ours: Row
    theirs: Row

    @property
    def ratio(self) -> float:
        """Their time over that of kfo_ext."""
        return self.theirs["seconds"]["median"] / self.ours["seconds"]["median"]


def comparisons() -> list[Against]:
    """Every committed meta-iteration of kfo_ext beside each of another package in the same result, the oldest first."""
    found = []
    for file in RESULTS.glob("*.json"):
        facts = json.loads(file.read_text())
        if not facts.get("command", "").startswith("meta_peers.py"):
            continue
        rows = [row for row in facts["rows"] if row["status"] == "ok"]
        for ours in (row for row in rows if row["contender"].startswith("ours")):
            for theirs in rows:
                peer, same = peer_of(theirs["contender"]), ("network", "method")
                if peer is not None and all(ours[key] == theirs[key] for key in same):
                    found.append(Against(f"bench/results/{file.name}", facts, peer, ours, theirs))
    return sorted(found, key=lambda each: (each.facts["started"], each.path))


def newest(network: str = "omniglot_cnn2", capability: str = "AVX512") -> list[Against]:
    """For each method and package the newest comparison on such a processor, with the fastest form of either side."""
    chosen: dict[tuple[str, str], list[Against]] = {}
    for each in comparisons():
        if each.facts.get("capability", capability) != capability:
            continue
        if each.ours["network"] == network and each.ours["contender"] in ("ours", "ours_native"):
            key = each.ours["method"], each.peer
            before = chosen.get(key, [])
            chosen[key] = [*before, each] if before and before[0].path == each.path else [each]
    best = {key: min(found, key=lambda each: each.ratio) for key, found in chosen.items()}
    return [best[method, peer] for method in METHODS for peer in PEERS if (method, peer) in best]
