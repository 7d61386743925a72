"""MAML and linear KFO on Omniglot, CNN(2), 5-way 5-shot, both tuned by one rule (paper, Table 3).

1. For each method, each inner rate of its grid and each start of the network is meta-trained for `--tuning-iterations`
   and judged on validation classes.
2. The `--finalists` best settings of each method go on to `--finalist-iterations`, with clipped meta-gradients as
   before and, from the beginning, without: clipping keeps KFO from diverging at large inner rates.
3. The best of them, and MAML at the paper's rate and start, unclipped, go on to `--iterations`. Each run keeps its best
   checkpoint on validation classes; one whose loss stops being finite ends early, and its best checkpoint counts. The
   outer rate halves every `--meta-lr-half-life` iterations, for all alike.
4. All three adapt to one seeded list of `--tasks` tasks of unseen test classes: accuracies, and paired differences.

Every part is a `kfo` command, `--jobs` at a time with one thread each; a part that is done already is not run again.

    python experiments/omniglot_cnn2.py --data-root DATA/omniglot
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kfo_ext.bench.result import write_result
from kfo_ext.machine import environment
from kfo_ext.networks import INITS
from kfo_ext.runs import RunFolder, plot_runs
from kfo_ext.runs.metrics import is_validation, read_metrics
from kfo_ext.trainer import Config, compare_runs

# MAML's grid: the paper's rate (Table D.6) and larger ones; KFO's: as many, around the paper's 0.1.
GRIDS = {"none": (0.08, 0.25, 0.5, 1.0, 1.5, 2.0), "kfo": (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)}
PAPER_RATE = 0.08
PAPER_ACCURACY = {"none": 0.666, "kfo": 0.9662}
LABELS = {"none": "MAML", "kfo": "KFO"}


class Setting(NamedTuple):
    """What is tuned of a method: inner rate, start of the network, and largest norm of the meta-gradient (0: any)."""

    rate: float
    init: str
    clip_norm: float


Entry = tuple[str, Setting]


def train(options: argparse.Namespace, update: str, setting: Setting, iterations: int, folder: Path) -> Path:
    """Meta-trains one run, or goes on with it where an earlier call was stopped; refuses a run of other settings."""
    if (folder / "config.json").exists():
        found = Config.load(folder / "config.json")
        ours = (update, *setting, options.meta_lr, options.meta_lr_half_life)
        if ours != (
            found.update, found.inner_lr, found.init, found.clip_norm, found.meta_lr, found.meta_lr_half_life,
        ):  # fmt: skip
            raise ValueError(f"{folder}: holds a run of other settings; choose another --runs")
        records = read_metrics(folder / "metrics.jsonl")
        if records and records[-1]["iteration"] >= iterations:
            return folder
        line = ["train", "--resume", str(folder), "--iterations", str(iterations)]
    else:
        values = {
            "run": folder, "dataset": "omniglot", "data-root": options.data_root, "update": update,
            "inner-lr": setting.rate, "init": setting.init, "meta-lr": options.meta_lr,
            "schedule": "half_life", "meta-lr-half-life": options.meta_lr_half_life,
            "clip-norm": setting.clip_norm, "layers": 2,
            "iterations": iterations, "threads": 1, "validation-tasks": 300,
        }  # fmt: skip
        line = ["train", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]
    if not command(line, may_fail=True):
        print(f"{folder.name}: ended early, best checkpoint kept", flush=True)
        if not (folder / "best.pt").exists():
            raise ValueError(f"{folder}: ended before its first checkpoint")
    return folder


def command(line: list[str], *, may_fail: bool = False) -> bool:
    """Runs one `kfo` command and says whether it succeeded; its progress and errors go to the terminal."""
    return (
        subprocess.run(
            [sys.executable, "-m", "kfo_ext", *line], check=not may_fail, stdout=subprocess.DEVNULL
        ).returncode
        == 0
    )


def best_validation(folder: Path, iterations: int) -> float:
    """The best of the validations up to so many iterations: an earlier call may have gone further."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if is_validation(record)]
    return max(record["validation_accuracy"] for record in records if record["iteration"] <= iterations)


def folder_of(options: argparse.Namespace, update: str, setting: Setting) -> Path:
    return options.runs / (f"{update}-{setting.init}-{setting.rate}" + ("" if setting.clip_norm else "-unclipped"))


def seconds(folder: Path) -> float:
    """What the run took so far, with its validations, on one thread beside `--jobs` - 1 others."""
    return read_metrics(folder / "metrics.jsonl")[-1]["elapsed"]


def train_all(
    options: argparse.Namespace, pool: ThreadPoolExecutor, entries: list[Entry], iterations: int
) -> dict[Entry, Path]:
    """Meta-trains each entry up to `iterations`, from where it is, and returns the folders."""
    jobs = {entry: pool.submit(train, options, *entry, iterations, folder_of(options, *entry)) for entry in entries}
    return {entry: job.result() for entry, job in jobs.items()}


def tune(options: argparse.Namespace, pool: ThreadPoolExecutor) -> dict[str, dict[Setting, float]]:
    """Per method, the best validation accuracy of each setting."""
    entries = [
        (update, Setting(rate, init, options.clip_norm))
        for init in INITS
        for update, grid in GRIDS.items()
        for rate in grid
    ]
    table: dict[str, dict[Setting, float]] = {update: {} for update in GRIDS}
    for (update, setting), folder in train_all(options, pool, entries, options.tuning_iterations).items():
        table[update][setting] = best_validation(folder, options.tuning_iterations)
        print(f"tuning {LABELS[update]} {setting}: validation accuracy {table[update][setting]:.4f}", flush=True)
    return table


def judge(options: argparse.Namespace, folder: Path) -> RunFolder:
    command(["eval", str(folder), "--tasks", str(options.tasks), "--threads", "1"])
    return RunFolder(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the Omniglot archives")
    parser.add_argument("--runs", type=Path, default=Path("runs/omniglot_cnn2"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/omniglot_cnn2.json"), help="result file")
    parser.add_argument("--iterations", type=int, default=2000, help="meta-iterations of the final runs")
    parser.add_argument("--finalists", type=int, default=2, help="settings of each method that go on after tuning")
    parser.add_argument("--finalist-iterations", type=int, default=400, help="meta-iterations of the finalists")
    parser.add_argument("--tuning-iterations", type=int, default=100, help="meta-iterations of each run of the grids")
    parser.add_argument("--meta-lr", type=float, default=0.003, help="outer learning rate (paper, Table D.7)")
    parser.add_argument("--meta-lr-half-life", type=int, default=1000, help="meta-iterations in which it halves")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="largest norm of a clipped meta-gradient")
    parser.add_argument("--tasks", type=int, default=1000, help="test tasks")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        tuning = tune(options, pool)
        ranked = {update: sorted(scores, key=scores.get, reverse=True) for update, scores in tuning.items()}
        entered = [
            (update, setting) for update, settings in ranked.items() for setting in settings[: options.finalists]
        ]
        entered += [(update, setting._replace(clip_norm=0.0)) for update, setting in entered]
        folders = train_all(options, pool, entered, options.finalist_iterations)
        reached = {entry: best_validation(folder, options.finalist_iterations) for entry, folder in folders.items()}
        for (update, setting), accuracy in reached.items():
            print(f"finalist {LABELS[update]} {setting}: validation accuracy {accuracy:.4f}", flush=True)
        best = {update: max((entry for entry in entered if entry[0] == update), key=reached.get) for update in GRIDS}
        paper = ("none", Setting(PAPER_RATE, "reference", 0.0))
        chosen = {"kfo": best["kfo"], "maml": best["none"], "maml-paper": paper}
        folders = train_all(options, pool, list(chosen.values()), options.iterations)
        judged = {name: pool.submit(judge, options, folders[entry]) for name, entry in chosen.items()}
        runs = {name: job.result() for name, job in judged.items()}

    finals = {}
    for name, (update, setting) in chosen.items():
        _, ours, gap = compare_runs(runs["kfo"], runs[name])
        finals[name] = {
            "method": LABELS[update],
            "inner_rate": setting.rate,
            "init": setting.init,
            "clip_norm": setting.clip_norm,
            "accuracy": ours.interval.mean,
            "interval": ours.interval.half,
            "checkpoint_iteration": ours.iteration,
            "training_seconds": seconds(folders[chosen[name]]),
            "paper": PAPER_ACCURACY[update],
            **({} if name == "kfo" else {"kfo_minus_this": gap.mean, "kfo_minus_this_interval": gap.half}),
        }
        print(f"{name}: {setting}, test accuracy {ours.interval}", flush=True)
        if name != "kfo":
            print(f"  KFO minus this, paired: {gap.mean:+.4f} ± {gap.half:.4f}", flush=True)
    result = {
        "what": "Omniglot, CNN(2), 32 channels, 5-way 5-shot, 5 steps, meta-batch 16; unseen classes; 95 % intervals",
        "environment": environment(),
        "training_seconds_of_all_runs": sum(seconds(folder) for folder in sorted(options.runs.iterdir())),
        "iterations": options.iterations,
        "finalist_iterations": options.finalist_iterations,
        "tuning_iterations": options.tuning_iterations,
        "meta_lr": options.meta_lr,
        "meta_lr_half_life": options.meta_lr_half_life,
        "test_tasks": options.tasks,
        "validation_accuracy_of_finalists": [
            {"method": LABELS[update], **setting._asdict(), "accuracy": accuracy}
            for (update, setting), accuracy in reached.items()
        ],
        "validation_accuracy_of_tuning": {
            LABELS[update]: [{**setting._asdict(), "accuracy": accuracy} for setting, accuracy in scores.items()]
            for update, scores in tuning.items()
        },
        "finals": finals,
    }
    write_result(options.out, result)
    labels = {
        name: f"{final['method']}, inner rate {final['inner_rate']}, {final['init']}" for name, final in finals.items()
    }
    plot_runs({labels[name]: runs[name].metrics for name in runs}, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
