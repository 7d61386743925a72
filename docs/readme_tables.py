"""The README's table of speed-ups, from the committed result files."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median

from measured import Row, by_contender, result, table

from bench.cpu_target_lines import best_of_torch, ratio

USER = "bench/results/user_cnn.json"
LOOPS = "bench/results/meta_peers_loops.json"
FUNC = "bench/results/torch_func.json"
OPERATOR = "bench/results/cpu_targets.json"


def speed() -> str:
    """Four speed-ups, each with the command that produced it; all are medians of interleaved repeats."""
    user, networks = by_contender(USER)
    loops, found = by_contender(LOOPS)
    func, operator = result(FUNC), result(OPERATOR)
    loop, plain = found["omniglot_cnn2"], {(row["method"], row["contender"]): row for row in func["rows"]}
    cnn = [_ratio(networks[name], "learn2learn", "ours_user") for name in ("omniglot_cnn2", "omniglot_cnn4")]
    learn2learn, torch = _operator(operator)
    rows = [
        [
            "`MAML`, your CNN(2), CNN(4), over learn2learn",
            f"{cnn[0]:.1f}x, {cnn[1]:.1f}x",
            _command(user),
        ],
        [
            "your loop, `kfo.step`, `fast_layers`, over learn2learn",
            f"{_ratio(loop, 'learn2learn', 'by_step_fast_layers'):.1f}x",
            _command(loops),
        ],
        [
            "`torch.func` with our operators, over PyTorch",
            f"{_median(plain['kfo', 'torch_func']) / _median(plain['kfo', 'torch_func_ours']):.1f}x",
            _command(func),
        ],
        [
            "`R^T G L`, second derivatives, over learn2learn, fastest PyTorch",
            f"{learn2learn:.0f}x, {torch:.1f}x",
            _command(operator),
        ],
    ]
    return table(
        ["CPU, two cores", "speed-up", "command"],
        rows,
        "META-KFO, 16 tasks, 5 steps; CNN(n) has n convolution blocks.",
    )


def _ratio(rows: dict[str, Row], theirs: str, ours: str) -> float:
    return _median(rows[theirs]) / _median(rows[ours])


def _median(row: Row) -> float:
    return row["seconds"]["median"]


def _operator(facts: Row) -> tuple[float, float]:
    """Over learn2learn's loop and over the fastest plain PyTorch, on the smallest network of the paper."""
    rows = [r for r in facts["rows"] if (r["group"], r["order"]) == ("CNN(2)", "double_backward") and "seconds" in r]
    seconds = {row["contender"]: row.get("runs", [_median(row)]) for row in rows}
    ours = seconds["native"]
    return tuple(median(ratio(seconds[name], ours)) for name in ("learn2learn", best_of_torch(seconds)))  # type: ignore[return-value]


def _command(facts: Row) -> str:
    script = re.match(r"\S+", facts["command"])
    assert script is not None
    return f"`bench/{script[0]}`"


TABLES: dict[str, Callable[[], str]] = {"readme-speed": speed}
