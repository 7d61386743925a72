"""The tables of the report, in Markdown. Accuracies are in %, differences in percentage points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os.path import relpath
from pathlib import Path
from statistics import fmean
from typing import Any

from kfo_ext.tasks import FAMILIES

from ..entry import INFERRED, Published
from ..halving import Halving
from ..jobs import Job, Settings, Test
from ..markdown import NONE, half, percent, table
from ..store import Results
from .claims import Judged, Off
from .outcomes import Book, Row, paired
from .statistics import Summary, summary


def number(published: Published | None) -> str:
    """A number of the paper; "" if it is unknown."""
    if published is None or published.value is None:
        return NONE
    return f"{published.value:g}{' (inferred)' if published.certainty == INFERRED else ''}"


def accuracies(rows: Sequence[Row], book: Book) -> str:
    """The paper's number, ours, and the paired difference from the baseline."""
    header = [
        "",
        "paper",
        "ours",
        "over seeds",
        "over tasks",
        "baseline",
        "less the baseline",
        "over seeds",
        "over tasks",
        "budget",
    ]
    return table(header, [_accuracy(row, book) for row in rows])


def _accuracy(row: Row, book: Book) -> list[str]:
    accuracy, less = row.accuracy(), _from_baseline(row, book)
    cells = [f"({row.reason})", NONE, NONE]
    if accuracy is not None:
        cells = [percent(accuracy.mean), half(accuracy.seeds), half(accuracy.tasks)]
    baseline = book.row(row.entry.baseline).title if row.entry.baseline else NONE
    cells += [
        baseline,
        *([NONE] * 3 if less is None else [percent(less.mean, True), half(less.seeds), half(less.tasks)]),
    ]
    return [row.label, ", ".join(filter(None, map(number, row.entry.published))), *cells, _cost(row, accuracy)]


def _cost(row: Row, accuracy: Summary | None) -> str:
    if row.work is None:
        return NONE
    seeds, test = len(row.work.seeds), row.test("best")
    done = f"{accuracy.n} of {seeds}" if accuracy and accuracy.n < seeds else str(seeds)
    tests = f", {test.tasks:,} test tasks" if test else NONE
    return f"{row.iterations:,} x {row.settings['meta_batch']} tasks, {done} seed{'' if seeds == 1 else 's'}{tests}"


def _from_baseline(row: Row, book: Book) -> Summary | None:
    if not row.entry.baseline:
        return None
    scores = paired([row], [book.row(row.entry.baseline)])
    return summary(scores) if scores else None


def settings(rows: Sequence[Row]) -> str:
    """Learning rates and initialization, with the paper's rates."""
    header = ("", "inner rate", "paper's", "outer rate", "paper's", "start", "inner rates tried")
    return table(header, [_settings(row) for row in rows if row.jobs or row.entry.rates])


def _settings(row: Row) -> list[str]:
    paper = row.entry.rates
    inner, outer = (None, None) if paper is None else (paper.inner, paper.outer)
    tried = "given" if not row.tuned else f"{len(row.tried)}: {row.tried[0]:g} to {row.tried[-1]:g}"
    edge = f" (the {row.edge} tried)" if row.edge else ""
    if not row.jobs:
        return [row.title, NONE, number(inner), NONE, number(outer), NONE, f"({row.reason})"]
    found = row.settings
    start = str(found.get("init", NONE)).replace("_", " ")
    rates = [f"{found['fast_lr']:g}{edge}", number(inner), f"{found['meta_lr']:g}", number(outer)]
    return [row.label, *rates, start, tried]


def protocols(rows: Sequence[Row]) -> str:
    """The sizes of tasks and the adaptation, in training and test."""
    header = ("", "ways", "shots", "queries", "inner steps", "test classes", "rotation of classes")
    body = [_protocol(row) for row in rows if row.work]
    if len(body) > 1 and len({tuple(cells[1:]) for cells in body}) == 1:
        body = [["every row", *body[0][1:]]]
    return table(header, body)


def _protocol(row: Row) -> list[str]:
    test, found = row.test("best"), row.settings
    sizes = [str(found.get(name, NONE)) for name in ("ways", "shots", "queries", "steps")]
    return [row.title, *sizes, NONE if test is None else test.split, _rotation(found)]


def _rotation(found: Settings) -> str:
    default = getattr(FAMILIES[found["dataset"]].options, "rotations", None)
    option = found.get("rotations", default)
    return NONE if option is None else "each its own" if option else "none"


def checkpoints(rows: Sequence[Row]) -> str:
    """The best checkpoint on validation classes and the last one: their difference shows a collapse."""
    header = ["", "best checkpoint", "of iterations", "last checkpoint", "last less best", "training tasks, at the end"]
    if any(test.split == "train" for row in rows for test in row.tests):
        header.append("best checkpoint, training classes")
        return table(header, [[*_checkpoints(row), _seen(row)] for row in rows if row.records])
    return table(header, [_checkpoints(row) for row in rows if row.records])


def _checkpoints(row: Row) -> list[str]:
    best, last = row.test("best"), row.test("last")
    found = [record.test(best) for record in row.records.values() if best and record.has(best)]
    one, other = row.accuracy(best), row.accuracy(last) if last else None
    training = [record.training[-1] for record in row.records.values() if record.training]
    return [
        row.title,
        percent(one and one.mean),
        ", ".join(_at(test) for test in found),
        percent(other and other.mean),
        percent(other.mean - one.mean, sign=True) if one and other and one.n == other.n else NONE,
        percent(fmean(training) if training else None),
    ]


def _seen(row: Row) -> str:
    """The accuracy on new tasks of training classes."""
    found = [row.accuracy(test) for test in row.tests if test.split == "train"]
    return percent(found[0].mean) if found and found[0] else NONE


def _at(test: Mapping[str, Any]) -> str:
    return test.get("failure") or f"{test['iteration']:,}"


def single_runs(rows: Sequence[Row]) -> str:
    """Best and last checkpoint of every run."""
    header = ("", "seed", "best checkpoint", "of iteration", "last checkpoint", "of iteration", "last less best")
    body = []
    for row in rows:
        for seed, record in sorted(row.records.items()):
            found = [record.test(test) for name in ("best", "last") if (test := row.test(name)) and record.has(test)]
            cells = [cell for each in found for cell in (percent(each["mean"]), _at(each))]
            means = [each["mean"] for each in found if each["mean"] is not None]
            cells += [NONE] * (4 - len(cells)) + [percent(means[1] - means[0], sign=True) if len(means) > 1 else NONE]
            body.append([row.title, str(seed), *cells])
    return table(header, body)


def changes(rows: Sequence[Row]) -> str:
    """The tests with other options than in training, such as steps; "" without any."""
    changed: list[Test] = []
    for row in rows:
        changed += [test for test in row.tests if test.changes and test not in changed]
    if not changed:
        return ""
    header = ["", *(" ".join(f"{value} {name}" for name, value in test.changes.items()) for test in changed)]
    cells = [(row, [_tested(row, test) for test in changed]) for row in rows if row.accuracy()]
    body = [[row.title, *found, _with_interval(row.accuracy())] for row, found in cells if any(found)]
    return table([*header, "as trained"], body)


def _tested(row: Row, test: Test) -> str:
    """The accuracy on a test, with the number of seeds that are not in it."""
    score, failed = _with_interval(row.accuracy(test)), row.failed(test)
    return f"{score} (not finite: {failed} of {len(row.records)})".lstrip() if failed else score


def _with_interval(accuracy: Summary | None) -> str:
    return NONE if accuracy is None else f"{percent(accuracy.mean)} ± {100 * accuracy.larger:.2f}"


def claims(found: Sequence[Judged]) -> str:
    """The verdicts on the paper's statements."""
    header = ("statement", "where", "difference", "over seeds", "over tasks", "seeds", "verdict")
    body = []
    for claim, difference, verdict in found:
        cells = [NONE] * 4
        if difference is not None:
            cells = [percent(difference.mean, sign=True), half(difference.seeds), half(difference.tasks)]
            cells.append(str(difference.n))
        body.append([claim.statement, claim.where, *cells, verdict])
    return table(header, body)


def off_the_paper(found: Sequence[Off]) -> str:
    """A line for each number of the paper outside our interval."""
    return "".join(
        f"- {row.label} ({where}): off by {points:+.2f} points. Tried: {'; '.join(_tried(row))}.\n"
        for row, where, points in found
    )


def _tried(row: Row) -> list[str]:
    searched = []
    if row.tuned and isinstance(row.work, Halving):
        starts = f", {len(row.work.inits)} starts of the network" if row.work.inits else ""
        rates = f"{len(row.tried)} inner rates, {row.tried[0]:g} to {row.tried[-1]:g}"
        searched = [f"{rates}{starts}, {len(row.work.meta_lrs)} outer rates"]
    return [*searched, *row.entry.tried] or ["no other setting"]


def tuning(results: Results) -> str:
    """Every run of the tuning of an entry; "" without any."""
    work = results.work
    if not isinstance(work, Halving) or not results.records:
        return ""
    runs: dict[tuple[float, float], dict[str, str]] = {}
    for job in _longest(work.tuning(results.records)):
        found = job.settings
        cells = runs.setdefault((found["fast_lr"], found["meta_lr"]), {})
        cells[found.get("init", NONE)] = _rungs(job, work, results)
    starts = list(dict.fromkeys(start for cells in runs.values() for start in cells))
    rungs = ", ".join(f"{at:,}" for at in _iterations(work))
    header = ["inner rate", "outer rate", *(start.replace("_", " ") or f"by {rungs}" for start in starts)]
    body = [
        [f"{r:g}", f"{m:g}", *(cells.get(start, NONE) for start in starts)] for (r, m), cells in sorted(runs.items())
    ]
    return table(header, body)


def _longest(jobs: Iterable[Job]) -> list[Job]:
    return list({job.key: job for job in sorted(jobs, key=lambda job: job.iterations)}.values())


def _iterations(work: Halving) -> list[int]:
    return [work.first, *(rung.iterations for rung in work.rungs)]


def _rungs(job: Job, work: Halving, results: Results) -> str:
    """The best validation by each rung that the run reached."""
    record = results.records.get(job.key)
    if record is None:
        return "missing"
    scores = [percent(record.best(at)) for at in _iterations(work) if at <= job.iterations and record.reached(at)]
    return " / ".join(scores) + (" (ended)" if record.ended else "")


def link(results: Results, page: Path) -> str:
    """A link from the page to the result file."""
    return f"[{results.path.name}]({Path(relpath(results.path, page.parent)).as_posix()})"


def sources(group: Sequence[str], results: Mapping[str, Results], page: Path) -> str:
    """Links to the result files of entries."""
    files = [
        f"{name}: {link(results[name], page)}" for name in group if name in results and results[name].path.exists()
    ]
    return f"Results: {'; '.join(files)}.\n" if files else ""
