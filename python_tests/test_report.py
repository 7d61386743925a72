"""The report: its statistics by hand, its verdicts at their borders, and the committed page, to the byte."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from made_up_runs import record, scored
from matplotlib.figure import Figure

from experiments import report
from experiments.entry import INFERRED, UNKNOWN, Computed, Entry, Published, Rates
from experiments.halving import Fixed, Following, Halving, Rung
from experiments.registry import ENTRIES
from experiments.registry.claims import CLAIMS, Claim, above, shrinks
from experiments.registry.groups import COLLAPSE, GROUPS, HEADLINE, Against, Group
from experiments.registry.published import COLUMNS, INNER, OUTER, cnn2, linear
from experiments.report import pictures, tables
from experiments.report.claims import judged, off, verdict
from experiments.report.outcomes import Book, paired
from experiments.report.statistics import Summary, difference, summary
from experiments.report.text import page
from experiments.store import Results
from experiments.svg import styled, svg

# Student's t for 95 %, from a printed table.
T_OF_1, T_OF_2, T_OF_3 = 12.7062, 4.30265, 3.18245


def scores(**seeds: list[float]) -> dict[int, torch.Tensor]:
    return {int(name[1:]): torch.tensor(values, dtype=torch.float64) for name, values in seeds.items()}


def half(values: list[float], t: float) -> float:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return t * math.sqrt(variance / len(values))


def test_the_intervals_equal_hand_computation():
    found = summary(scores(s0=[0.2, 0.4, 0.9], s1=[0.4, 0.5, 0.3], s7=[0.9, 0.9, 0.3]))
    assert found.mean == pytest.approx(4.8 / 9, abs=1e-15)
    assert found.seeds == pytest.approx(half([0.5, 0.4, 0.7], T_OF_2), rel=1e-4)
    assert found.tasks == pytest.approx(half([0.5, 0.6, 0.5], T_OF_2), rel=1e-4)
    assert found.n == 3


def test_one_seed_has_no_interval_over_seeds():
    found = summary(scores(s0=[0.2, 0.4, 0.9, 0.1]))
    assert found.seeds is None
    assert found.tasks == pytest.approx(half([0.2, 0.4, 0.9, 0.1], T_OF_3), rel=1e-4)
    assert summary(scores(s0=[0.5], s1=[0.6])).tasks is None


def test_differences_are_paired_by_task_and_common_seed():
    better = scores(s0=[0.9, 0.8], s1=[0.7, 0.7], s2=[0.1, 0.1])
    worse = scores(s1=[0.5, 0.9], s0=[0.8, 0.2], s3=[0.0, 0.0])
    found = difference([better], [worse])
    assert list(found) == [0, 1]
    torch.testing.assert_close(found[0], torch.tensor([0.1, 0.6], dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.tensor([0.2, -0.2], dtype=torch.float64))
    assert summary(found).seeds == pytest.approx(half([0.35, 0.0], T_OF_1), rel=1e-4)
    assert summary(found).tasks == pytest.approx(half([0.15, 0.2], T_OF_1), rel=1e-4)


def test_a_gain_that_shrinks_is_a_difference_of_differences():
    small, large = scores(s0=[0.9, 0.7]), scores(s0=[0.5, 0.6])
    assert difference([small, large], [large, small])[0].tolist() == [0.0, 0.0]
    assert difference([small, small], [large, large])[0].tolist() == pytest.approx([0.8, 0.2])


def test_scores_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match="of the same tasks, got"):
        difference([scores(s0=[0.1, 0.2])], [scores(s0=[0.1])])
    with pytest.raises(ValueError, match="one number of tasks"):
        summary(scores(s0=[0.1, 0.2], s1=[0.1]))


@pytest.mark.parametrize(
    ("mean", "seeds", "n", "expected"),
    [
        (0.03, 0.02, 3, "reproduced"),
        (-0.03, 0.02, 3, "reversed"),
        (0.02, 0.02, 3, "undecided"),
        (-0.02, 0.02, 3, "undecided"),
        (0.03, 0.0, 3, "reproduced"),
        (0.0, 0.0, 3, "undecided"),
        (0.30, 0.02, 2, "undecided"),
        (0.30, None, 1, "undecided"),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_without_zero(mean, seeds, n, expected):
    # That over tasks does not count.
    assert verdict(Summary(mean, seeds, 0.5, n)) == expected


def test_a_claim_without_results_is_not_run():
    assert verdict(None) == "not run"


# Made-up entries of every kind.
BASE = {"dataset": "glyphs", "ways": 5, "shots": 5, "queries": 5, "steps": 5, "meta_batch": 4, "layers": 2}
FINAL = (scored(40), scored(40, checkpoint="last"))
HALVING = Halving(
    base={**BASE, "meta_lr": 0.003},
    rates=(0.1, 0.2, 0.4),
    inits=("torch", "zero_head"),
    meta_lrs=(0.001, 0.003),
    first=200,
    rungs=(Rung(iterations=300, keep=2), Rung(iterations=400, keep=1)),
    seeds=(0, 1, 2),
    tests=(*FINAL, scored(40, changes={"steps": 2}), scored(40, split="train")),
)
FIXED = Fixed(
    base={**BASE, "fast_lr": 0.1, "meta_lr": 0.003}, variants={"": {}}, iterations=300, seeds=(0, 1, 2), tests=FINAL
)
CONTROLS = replace(FIXED, variants={"clipped": {"clip_norm": 1.0}, "slow": {"meta_lr": 0.001}})


def drawn(value):
    return f"Shown {value['number']}: ![of it](paper/own.svg)", {"own.svg": b"<svg/>"}


def entry(name: str, work=None, **facts) -> Entry:
    works = {} if work is None else {"cpu": work}
    return Entry(name=name, **{"title": f"row {name}", "group": "one", "works": works, **facts})


MADE_UP = [
    entry(
        "best",
        HALVING,
        published=(Published("Table 9, best", 99.9, INFERRED),),
        rates=Rates(Published("Table D.6", 0.1), Published("Table D.7", None, UNKNOWN)),
        baseline="worst",
        choices=("a choice",),
        tried=("a longer run",),
    ),
    entry("worst", replace(HALVING, base={**BASE, "meta_lr": 0.003, "layers": 1})),
    entry("edge", replace(HALVING, rates=(0.1,), base={**BASE, "meta_lr": 0.003, "layers": 3})),
    entry("ended", FIXED, group="two"),
    entry("controls", CONTROLS, group="two"),
    entry("started", HALVING, group="two"),
    entry("follows", Following(of="started", variants={"x": {}}, iterations=300, seeds=(0,), tests=FINAL), group="two"),
    entry("never", why_not="needs a GPU", published=(Published("Table 9, never", 50.0),)),
    entry("computed", Computed(function=drawn, shown=drawn), group="three"),
    entry("silent", Computed(function=drawn), group="three"),
]
SECTIONS = (
    Group(
        name="one",
        title="One",
        text="Text of one.",
        against=(Against(option="layers", unit="layers of it", series={"rows": ("best", "worst")}),),
    ),
    Group(name="two", title="Two", text="Text of two."),
    Group(name="three", title="Three", text="Text of three."),
)
STATEMENTS = (
    above("best", "worst", "best is best", "Table 9"),
    above("worst", "best", "worst is best", "Table 9"),
    above("best", "ended", "two seeds are few", "Table 9"),
    above("best", "controls/slow", "no result yet", "Table 9"),
)


def finish(results: Results, curve, right, *, seeds=(0, 1, 2), ended=()) -> None:
    """Give every run that is missing, of these seeds; those of `ended` end after 200 iterations, or before 100."""
    while jobs := [job for job in results.work.missing(results.records) if job.settings["seed"] in seeds]:
        for job in jobs:
            end = dict(ended).get(job.settings["seed"], 0) if job.tests else 0
            results.add(job.key, record(job, curve, right, ended=end), [{"commit": "abc"}])


def rising(settings, at):
    """0.2 with zero head is best; every seed has a curve of its own."""
    rate = abs(math.log2(settings["fast_lr"] / 0.2))
    return round(0.8 - 0.1 * rate + (settings.get("init") == "zero_head") * 0.05 + at / 1e4 - settings["seed"] / 100, 5)


def larger(settings, at):
    return min(1.0, 0.5 + settings["fast_lr"] / 10)


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Book:
    tmp_path = tmp_path_factory.mktemp("results")
    entries = {each.name: each for each in MADE_UP}

    def results(name: str) -> Results:
        return Results(entries[name], "cpu", tmp_path, entries)

    finish(results("best"), rising, lambda settings, test, task: 20 + task % 3 - (test.checkpoint == "last"))
    finish(results("worst"), rising, lambda settings, test, task: 15 + task % 3 + settings["seed"])
    finish(results("edge"), larger, lambda *_: 20, seeds=(0,))
    finish(results("ended"), rising, lambda *_: 18, ended=((1, 200), (2, 50)))
    finish(results("controls"), rising, lambda *_: 18, seeds=())
    for job in results("started").work.missing({})[:3]:
        results("started").add(job.key, record(job, rising), [])
    results("computed").set({"number": 3}, [{}])
    return Book.read(entries, "cpu", tmp_path)


@pytest.fixture(scope="module")
def whole(book) -> tuple[str, dict[str, bytes]]:
    return made(book)


def made(book: Book, **changes) -> tuple[str, dict[str, bytes]]:
    parts = {"groups": SECTIONS, "claims": STATEMENTS, "collapse": ("ended", "controls")}
    headline = {"A, tuned": "best", "B, tuned": "worst", "C": "ended", "D": "started"}
    found = page(book, Path("docs/paper.md"), headline=headline, **{**parts, **changes})
    return found.text(), found.pictures


def row_of(text: str, *starts: str) -> list[list[str]]:
    """Cells of the lines of tables whose first cells are these."""
    lines = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    lines = [[line[0][2:].strip(), *line[1:-1], line[-1][:-1].strip()] for line in lines]
    return [line for line in lines if line[: len(starts)] == list(starts)]


def test_a_row_holds_the_paper_ours_and_the_paired_difference(book, whole):
    text, _ = whole
    accuracy, settings = row_of(text, "row best, tuned")[:2]
    checkpoints, changed = row_of(text, "row best")[:2]
    # 40 tasks of 20, 21, 22 right of 25: 14, 13 and 13 of them.
    right = [20 + task % 3 for task in range(40)]
    mean, over_tasks = sum(right) / 40 / 25, half([each / 25 for each in right], 2.0227)
    assert accuracy[1:5] == ["99.9 (inferred)", f"{100 * mean:.2f}", "± 0.00", f"± {100 * over_tasks:.2f}"]
    # The baseline has 5 fewer right, less the seed.
    assert accuracy[5:7] == ["row worst", f"+{100 * (5 - 1) / 25:.2f}"]
    assert accuracy[7] == f"± {100 * half([5 / 25, 4 / 25, 3 / 25], T_OF_2):.2f}"
    assert accuracy[8:] == ["± 0.00", "400 x 4 tasks, 3 seeds, 40 test tasks"]
    assert settings == ["row best, tuned", "0.2", "0.1", "0.003", "", "zero head", "3: 0.1 to 0.4"]
    assert checkpoints[1:5] == [f"{100 * mean:.2f}", "400, 400, 400", f"{100 * mean - 4:.2f}", "-4.00"]
    assert [cell.split(" ± ")[0] for cell in changed[1:]] == [f"{100 * mean:.2f}"] * 2


def test_what_is_missing_says_why(book, whole):
    text, _ = whole
    reasons = {name: row_of(text, f"row {name}")[0][2] for name in ("never", "started", "follows", "controls: slow")}
    assert reasons["never"] == "(needs a GPU)"
    assert reasons["started"] == "(being tuned)"
    assert reasons["follows"].startswith("(not run yet: it takes the setting of")
    assert reasons["controls: slow"] == "(not run yet)"
    assert row_of(text, "row never")[0][1] == "50"
    assert "row silent: not run yet." in text


def test_runs_that_ended_are_said_and_do_not_count(book, whole):
    text, _ = whole
    assert "row ended: seed 1 ended after iteration 200 (iteration 201: loss is not finite); its best" in text
    assert "row ended: seed 2 ended after iteration 50 (iteration 51: loss is not finite); it has no score" in text
    assert row_of(text, "row ended")[0][-1] == "300 x 4 tasks, 2 of 3 seeds, 40 test tasks"
    assert [line[1] for line in row_of(text, "row ended") if line[1] in ("0", "1", "2")] == ["0", "1", "2"]


def test_a_score_that_is_not_finite_is_said_and_does_not_count(tmp_path):
    entries = {"one": entry("one", replace(FIXED, seeds=(0, 1)))}
    results = Results(entries["one"], "cpu", tmp_path, entries)
    finish(results, rising, lambda *_: 18)
    first = min(results.records.values(), key=lambda each: each.settings["seed"])
    first.tests[0] |= {"mean": None, "interval": None, "iteration": None, "correct": "", "failure": "not finite"}
    results.add("unused", first, [])
    row = Book.read(entries, "cpu", tmp_path).row("one")
    assert row.remarks() == ["seed 0 has no finite score"]
    assert row.accuracy().n == 1
    lines = [[cell.strip() for cell in line.split("|")] for line in tables.single_runs([row]).splitlines()[2:]]
    assert lines[0][2:7] == ["0", "", "not finite", "72.00", "300"]
    assert "| not finite, 300 | 72.00 |  |" in tables.checkpoints([row])


@pytest.mark.parametrize("failed", [1, 2])
def test_seeds_that_fail_with_other_options_are_counted(tmp_path, failed):
    tests = (*FINAL, scored(40, changes={"steps": 2}))
    entries = {"one": entry("one", replace(FIXED, seeds=(0, 1), tests=tests))}
    results = Results(entries["one"], "cpu", tmp_path, entries)
    finish(results, rising, lambda *_: 18)
    for key, each in list(results.records.items())[:failed]:
        lost = {"mean": None, "interval": None, "iteration": None, "correct": "", "failure": "not finite"}
        each.tests[-1] |= lost
        results.add(key, each, [])
    score = "72.00 ± 0.00 " if failed == 1 else ""
    (line,) = tables.changes([Book.read(entries, "cpu", tmp_path).row("one")]).splitlines()[2:]
    assert line == f"| row one | {score}(not finite: {failed} of 2) | 72.00 ± 0.00 |"


def test_verdicts_of_the_made_up_results(book, whole):
    found = [judged(claim, book).verdict for claim in STATEMENTS]
    assert found == ["reproduced", "reversed", "undecided", "not run"]
    text, _ = whole
    for claim, expected in zip(STATEMENTS, found):
        assert row_of(text, claim.statement)[0][-1] == expected


def test_a_number_off_the_paper_gets_a_line(book, whole):
    (line,) = off(book)
    assert (line.row.name, line.where) == ("best", "Table 9, best")
    text, _ = whole
    assert f"- row best, tuned (Table 9, best): off by {line.points:+.2f} points. Tried: 3 inner rates" in text
    assert "0.1 to 0.4, 2 starts of the network, 2 outer rates; a longer run." in text


def test_a_number_on_the_border_of_our_interval_is_not_off(book):
    accuracy = book.row("best").accuracy()
    border = 100 * (accuracy.mean + accuracy.tasks)
    for value, expected in ((border - 1e-9, 0), (border + 1e-9, 1)):
        published = replace(book.row("best").entry, published=(Published("here", value),))
        rows = tuple(replace(row, entry=published) if row.name == "best" else row for row in book.rows)
        assert len(off(replace(book, rows=rows))) == expected


def test_an_edge_winner_is_marked(tmp_path):
    entries = {"edge": entry("edge", replace(HALVING, seeds=(0,)))}
    finish(Results(entries["edge"], "cpu", tmp_path, entries), larger, lambda *_: 20)
    row = Book.read(entries, "cpu", tmp_path).row("edge")
    # Three widenings of 0.1, 0.2, 0.4.
    assert (row.edge, row.tried) == ("largest", (0.1, 0.2, 0.4, 0.8, 1.6, 3.2))
    assert tables.settings([row]).splitlines()[2].startswith("| row edge, tuned | 3.2 (the largest tried) |")


def test_every_run_of_the_tuning_has_a_cell(book, whole):
    text, _ = whole
    part = text[text.index("## Tuning, every run") :].split("### ")[1]
    cells = {(line[0], line[1]): line[2:] for line in row_of(part.split("row worst:")[0]) if line[0][:2] == "0."}
    # The best two go on, the best of them with the other outer rate, and of those three one.
    assert cells["0.1", "0.003"] == ["72.00", "77.00"]
    assert cells["0.2", "0.003"] == ["82.00 / 83.00", "87.00 / 88.00 / 89.00"]
    assert cells["0.2", "0.001"] == ["", "87.00 / 88.00"]
    assert cells["0.4", "0.003"] == ["72.00", "77.00"]
    assert "missing" in text[text.index("row started:") :]


def test_what_a_function_computed_is_shown_by_its_own(book, whole):
    text, found = whole
    assert "Shown 3: ![of it](paper/own.svg)" in text
    assert found["own.svg"] == b"<svg/>"


def test_a_picture_that_the_text_does_not_show_is_refused(book, whole):
    bad = replace(
        book.entries["computed"], works={"cpu": Computed(function=drawn, shown=lambda value: ("", {"own.svg": b""}))}
    )
    entries = {**book.entries, "computed": bad}
    with pytest.raises(ValueError, match=r"pictures: expected those that the text shows"):
        made(Book.read(entries, "cpu", book.results["best"].folder))


def test_a_group_without_a_section_and_a_title_twice_are_refused(book, whole):
    with pytest.raises(ValueError, match=r"computed: expected a group of registry/groups.py, got 'three'"):
        made(book, groups=SECTIONS[:2])
    twin = replace(book.entries["worst"], title="row best")
    with pytest.raises(ValueError, match="worst: expected a title of its own in one, got 'row best'"):
        made(replace(book, entries={**book.entries, "worst": twin}))


def test_other_tasks_are_not_compared(book):
    row = book.row("worst")
    jobs = tuple(replace(job, settings={**job.settings, "ways": 20}) for job in row.jobs)
    with pytest.raises(ValueError, match="expected scores of the same tasks"):
        paired([book.row("best")], [replace(row, jobs=jobs)])


def test_pictures_have_captions_and_are_the_same_to_the_byte(book, whole):
    text, found = whole
    expected = {"headline", "one", "collapse-runs", "tuning-one", "tuning-two", "one-layers", "own"}
    assert {Path(name).stem for name in found} == expected
    for name in found:
        assert name == "own.svg" or re.search(rf"!\[[^\]]+\.\]\(paper/{name}\)\n\n\*[^*]+\*\n", text)
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.hashsalt": None}):
        assert made(book) == (text, found)
    assert b"<dc:date>" not in found["headline.svg"]
    assert b"meta-iterations" in found["headline.svg"] and b"%" in found["headline.svg"]


def test_a_picture_does_not_depend_on_the_last_bits_of_its_coordinates():
    """They differ between processors, and matplotlib names parts by hashes of them."""
    files = []
    for height in (0.8, math.nextafter(0.8, 1)):
        with styled():
            figure = Figure()
            axes = figure.add_axes((0.1, 0.1, 0.8, height))
            axes.plot([1, 2], [1, 2], marker="o")
            files.append(svg(figure))
    assert files[0] == files[1]
    named = re.findall(rb' id="(part-\d+)"', files[0])
    assert len(named) == len(set(named)) > 3
    assert set(re.findall(rb"#(part-\d+)", files[0])) == set(named)


def test_a_band_ends_where_not_all_seeds_go_on(book):
    line = pictures.over_seeds(list(book.row("best").records.values()))
    assert line.x == [100, 200, 300, 400]
    assert line.y[0] == pytest.approx(line.high[0] - 0.01) == pytest.approx(line.low[0] + 0.01)
    assert pictures.over_seeds([*book.row("ended").records.values()][:2]).x == [100, 200]
    assert pictures.over_seeds([]) is None


def test_without_any_result_there_is_a_page(tmp_path):
    content = report.files(tmp_path / "docs" / "paper.md", tmp_path / "none")
    assert list(content) == [tmp_path / "docs" / "paper.md"]


def test_writing_removes_pictures_that_are_not_shown(tmp_path):
    path = tmp_path / "docs" / "paper.md"
    report.write(path, tmp_path / "none")
    (path.parent / "paper" / "old.svg").write_text("")
    report.write(path, tmp_path / "none")
    assert [file.name for file in (path.parent / "paper").iterdir()] == []
    assert path.read_text().startswith("# The paper, reproduced")


def test_the_registry_names_what_there_is():
    for claim in CLAIMS:
        for name in (*claim.better, *claim.worse):
            assert name.partition("/")[0] in ENTRIES, claim
    for row in ENTRIES.values():
        assert row.group in {group.name for group in GROUPS}
        assert not row.baseline or row.baseline in ENTRIES
    for group in GROUPS:
        for picture in group.against:
            for names in picture.series.values():
                assert {name.partition("/")[0] for name in names} <= set(ENTRIES)
    assert {*HEADLINE.values(), *COLLAPSE} <= set(ENTRIES)


def test_the_published_rates_are_those_of_the_tables():
    assert cnn2("Omniglot", "MAML + KFO") == Rates(
        Published("Table D.6, Omniglot, MAML + KFO", 0.1), Published("Table D.7, Omniglot, MAML + KFO", 0.003, INFERRED)
    )
    assert cnn2("mini-ImageNet", "MAML + MC").outer.value is None
    assert cnn2("CIFAR-FS", "ANIL").outer.value == 0.002
    assert linear("Omniglot", "LR + LinNet").inner.value == 0.08
    assert {len(row) for row in (*INNER.values(), *OUTER.values())} == {len(COLUMNS)}
    with pytest.raises(ValueError, match="not in tuple"):
        cnn2("Omniglot", "T-Nets")


def test_a_claim_needs_as_many_worse_as_better():
    with pytest.raises(ValueError, match="as many better as worse"):
        Claim(statement="s", where="w", better=("a", "b"), worse=("c",))
    assert shrinks(("a", "b"), ("c", "d"), "s", "w").better == ("a", "d")


def test_the_committed_page_is_that_of_the_committed_results():
    """Markdown always; an SVG only where the matplotlib that it names is the one that is installed."""
    found = report.files()
    for path, content in found.items():
        committed = path.read_bytes()
        version = re.search(rb"Matplotlib v([\d.]+\w*),", committed)
        if path.suffix == ".md" or version is None or version[1].decode() == matplotlib.__version__:
            assert committed == content, f"{path.name}: run `python -m experiments report`"
    shown = {path for path in found if path.suffix == ".svg"}
    assert set((report.PAGE.parent / "paper").glob("*.svg")) == shown
