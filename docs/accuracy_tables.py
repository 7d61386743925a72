"""Tables of accuracy from the results of the experiments: META-KFO and MAML on Omniglot, CNN(2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from measured import table

from experiments.halving import Halving
from experiments.jobs import Job
from experiments.registry import ENTRIES
from experiments.report import BUDGET
from experiments.report.outcomes import Book, Row
from experiments.store import RESULTS

# By entry: how a table calls it. Baselines stand below what they are compared with.
ROWS = {
    "omniglot-cnn2-kfo": "META-KFO, tuned",
    "omniglot-cnn2-kfo-clipped": "META-KFO, tuned, meta-gradients clipped",
    "omniglot-cnn2-kfo-decayed": "META-KFO, tuned, outer rate decayed",
    "omniglot-cnn2-kfo-paper": "META-KFO, paper's rates",
    "omniglot-cnn2-kfo-fixed": "META-KFO, factors not adapted, tuned",
    "omniglot-cnn2-maml": "MAML, tuned",
    "omniglot-cnn2-maml-clipped": "MAML, tuned, meta-gradients clipped",
    "omniglot-cnn2-maml-paper": "MAML, paper's rates",
}
# Suffixes of entries, in the order of the columns of the README.
HOW = ("", "-clipped", "-paper")
TUNED = {"META-KFO": "omniglot-cnn2-kfo", "MAML": "omniglot-cnn2-maml"}


@cache
def _book() -> Book:
    entries = {name: entry for name, entry in ENTRIES.items() if name in ROWS}
    return Book.read(entries, BUDGET, RESULTS)


def accuracy() -> str:
    """Each row's setting and test accuracy, and how its training ended."""
    rows = []
    for row in _rows():
        rate, start = row.settings["fast_lr"], row.settings["init"].replace("_", " ")
        rows.append([ROWS[row.name], f"{rate:g}", start, *_scores(row), _published(row), _ended(row)])
    head = ["method", "inner rate", "start", "best checkpoint, %", "last checkpoint, %", "paper, %", "training"]
    return table(head, rows, _made(_rows(), "± is half of the 95 % interval over seeds."))


def short() -> str:
    """For the README: the best checkpoints of each method, by how its setting was found."""
    found = {row.name: f"{_scores(row)[0]}{'' if len(row.records) > 1 else ' (one seed)'}" for row in _rows()}
    rows = [
        [label, *(found.get(f"{name}{how}", "not run") for how in HOW), _published(_book().row(name))]
        for label, name in TUNED.items()
    ]
    head = ["accuracy, %", "tuned", "meta-gradients clipped", "paper's rates", "paper"]
    decayed, unadapted = (found.get(f"omniglot-cnn2-kfo-{name}", "not run") for name in ("decayed", "fixed"))
    note = (
        "Omniglot, CNN(2), 5-way 5-shot, best checkpoints of three seeds. META-KFO, outer rate decayed: "
        f"{decayed}; factors not adapted: {unadapted}. `python -m experiments run table-3 collapse`."
    )
    return table(head, rows, note)


def grid() -> str:
    """Validation accuracy of the tuning's first rung."""
    rows = []
    for label, name in TUNED.items():
        row = _book().row(name)
        assert isinstance(row.work, Halving)
        records = _book().results[name].records
        for start in row.work.inits:
            cells = []
            for rate in row.tried:
                settings = {**row.work.base, "fast_lr": rate, "init": start, "seed": row.work.seeds[0]}
                record = records[Job(settings=settings, iterations=row.work.first).key]
                cells.append(f"{rate:g}: {100 * record.best(row.work.first):.0f}")
            rows.append([label, start.replace("_", " "), ", ".join(cells)])
    note = f"{row.work.first} meta-iterations each; 0 where the loss was not finite."
    return table(["method", "start", "inner rate: validation accuracy, %"], rows, f"{_command(TUNED.values())} {note}")


def _rows() -> list[Row]:
    found = [_book().row(name) for name in ROWS]
    return [row for row in found if row.scores(row.test("best"))]


def _scores(row: Row) -> list[str]:
    """Of the best and of the last checkpoint."""
    found = []
    for checkpoint in ("best", "last"):
        score = row.accuracy(row.test(checkpoint))
        half = "" if score is None or score.seeds is None else f" ± {100 * score.seeds:.1f}"
        found.append("" if score is None else f"{100 * score.mean:.1f}{half}")
    return found


def _published(row: Row) -> str:
    (published,) = row.entry.published or ENTRIES[row.entry.name.rpartition("-")[0]].published
    return f"{published.value:.1f}"


def _ended(row: Row) -> str:
    """Which of the seeds' trainings lost what they had learned: more than 5 points below their best validation."""
    ended = sorted(record.iterations for record in row.records.values() if record.ended)
    lost = [record for record in row.records.values() if record.accuracy[-1] < max(record.accuracy) - 0.05]
    after = ", ".join(f"{iterations:,}" for iterations in ended)
    parts = [f"{len(ended)} diverged after {after} iterations"] if ended else []
    parts += [f"{len(lost)} collapsed" for _ in lost[:1]]
    seeds = f"{len(row.records)} {'seed' if len(row.records) == 1 else 'seeds'}"
    return f"{seeds}: {', '.join(parts) or 'stable'}"


def _protocol(rows: Sequence[Row]) -> str:
    of = rows[0].settings
    tests = rows[0].test("best")
    assert tests is not None
    return (
        f"{_command([row.entry.name for row in rows])} {of['ways']}-way {of['shots']}-shot, {of['steps']} inner steps, "
        f"{of['meta_batch']} tasks, {rows[0].iterations:,} meta-iterations; best checkpoint on validation classes, "
        f"{tests.tasks:,} tasks of test classes; ± is half of the 95 % interval over seeds."
    )


def _made(rows: Sequence[Row], note: str) -> str:
    """Where the numbers come from: command, protocol, machine and versions."""
    machines = {
        f"{each['processor']}, Python {each['python']}, torch {each['torch']}"
        for row in rows
        for each in _book().results[row.entry.name].environments
    }
    return f"{_protocol(rows)} {'; '.join(sorted(machines))}; the commits are in the result files."


def _command(names: Sequence[str]) -> str:
    return f"`python -m experiments run {' '.join(dict.fromkeys(names))}`."


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy, "grid": grid, "readme-accuracy": short}
