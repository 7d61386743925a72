"""The speed of docs/results/speed.md: every loss is in its tables, and its pictures are those of the results."""

from __future__ import annotations

import json
import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import matplotlib
import pytest
from made_up_runs import record
from matplotlib.text import Annotation
from pages import DOCS, ROOT, script
from PIL import Image

from experiments.entry import BUDGETS
from experiments.halving import Halving
from experiments.registry import ENTRIES
from experiments.store import Results
from kfo_ext.bench import plots, report

PAGE = DOCS / "results" / "speed.md"
MEASURED = ROOT / "bench" / "results" / "transform_cpu.json"

pytestmark = pytest.mark.skipif(not (DOCS.is_dir() and MEASURED.exists()), reason="docs/ is not beside the tests")


def iteration(contender: str, median: float, **facts) -> dict:
    row = {"network": "omniglot_cnn2", "method": "kfo", "contender": contender, "status": "ok"}
    return {**row, "seconds": {"median": median}, **facts}


@pytest.fixture
def results(tmp_path):
    """Writes a result of bench/meta_peers.py into a folder of their own."""

    def write(name: str, started: str, *rows: dict, **facts) -> None:
        content = {"command": "meta_peers.py", "started": started, "rows": rows, **facts}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    return write


def test_a_comparison_is_within_a_result_and_not_with_what_runs_on_kfo_ext(results, monkeypatch, tmp_path):
    measured = script("measured")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    rows = [iteration("ours_native", 2.0), iteration("ours_user_loop", 4.0), iteration("higher", 3.0)]
    others = [
        iteration(name, 1.0) for name in ("learn2learn_our_kfo", "by_hand", "torch_func_ours", "jax_vmap_compiled")
    ]
    results("one", "2026-01-01", *rows, *others, iteration("torchopt", 1.0, status="WRONG"))
    (tmp_path / "other.json").write_text('{"command": "else.py", "rows": []}')
    found = {(each.ours["contender"], each.peer): each.ratio for each in measured.comparisons()}
    assert found == {
        ("ours_native", "higher"): 1.5,
        ("ours_user_loop", "higher"): 0.75,
        ("ours_native", "jax"): 0.5,
        ("ours_user_loop", "jax"): 0.25,
    }


def test_the_newest_result_counts_and_in_it_the_fastest_form_of_a_package(results, monkeypatch, tmp_path):
    measured = script("measured")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    results("old", "2026-01-01", iteration("ours_native", 1.0), iteration("jax_map", 2.0), iteration("higher", 5.0))
    rows = iteration("jax_vmap", 4.0), iteration("jax_map", 3.0), iteration("ours_user_loop", 9.0)
    results("new", "2026-01-02", iteration("ours_native", 1.0), *rows)
    assert [(each.path, each.peer, each.ratio) for each in measured.newest()] == [
        ("bench/results/old.json", "higher", 5.0),
        ("bench/results/new.json", "jax", 3.0),
    ]


def test_results_of_other_instructions_are_not_beside_each_other(results, monkeypatch, tmp_path):
    measured = script("measured")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    for name, day in (("AVX512", "2026-01-01"), ("AVX2", "2026-01-02")):
        results(name, day, iteration("ours_native", 1.0), iteration("higher", 3.0), capability=name)
    assert [each.path for each in measured.newest()] == ["bench/results/AVX512.json"]
    assert [each.path for each in measured.newest(capability="AVX2")] == ["bench/results/AVX2.json"]


def test_losses_are_below_one_the_worst_first():
    tables = script("loss_tables")
    ratios = (0.9, 1.0, 0.5, 2.0, 0.999)
    every = [tables.Compared("where", "form", "other", "2 s", "1 s", ratio, "path") for ratio in ratios]
    assert [each.ratio for each in tables.losses(every)] == [0.5, 0.9, 0.999]


def test_every_loss_of_kfo_bench_is_in_the_page():
    """Those that the benchmark itself counts, of each provider of this package."""
    rows = report.read(MEASURED)["rows"]
    lost = [row for row in rows if row["ours"] and row["other_over_this"] and row["other_over_this"] < 1]
    assert lost
    text = PAGE.read_text()
    forms = script("loss_tables").FORMS
    for row in lost:
        times = (
            report.seconds_text(seconds) for seconds in (row["median_s"], row["median_s"] * row["other_over_this"])
        )
        order = row["order"].replace("_", " ")
        cells = re.escape(" | ".join([forms[row["provider"]], row["best_other"], *times]))
        assert re.search(rf"^\| .*{order} \| {cells} \|", text, flags=re.MULTILINE), row


def test_where_a_table_comes_from_names_no_folder_of_a_machine():
    measured = script("measured")
    facts = {"command": "x.py --a 1 --out /tmp/some/x.json --b", "processor": "p", "python": "3", "torch": "2"}
    facts |= {"commit": "0123456789abcdef-dirty", "torch_threads": 2, "jax": "0.1", "higher": "0.2"}
    facts["rows"] = [{"contender": "jax_map", "status": "ok"}, {"contender": "higher", "status": "not installed"}]
    text = measured.made("bench/results/x.json", facts, "Notes.")
    assert text == (
        "`bench/results/x.json`: `python bench/x.py --a 1 --out bench/results/x.json --b`, p, 2 threads, Python 3, "
        "torch 2, JAX 0.1, commit 0123456789ab with uncommitted changes. Notes."
    )
    bench = measured.made("bench/results/x.json", facts | {"command": "cli.py bench --out runs/bench"})
    assert "`kfo bench --out runs/bench`" in bench
    assert not re.search(r"/tmp|/home|/work", PAGE.read_text())


def test_a_table_without_rows_says_so():
    assert script("measured").table(["a"], [], "Of x.") == "None.\n\nOf x.\n"


def test_the_pictures_are_those_of_the_results():
    """An SVG only where the matplotlib that it names is the one that is installed."""
    made = script("make_pictures")
    for path, content in made.pictures().items():
        committed = path.read_bytes()
        version = re.search(rb"Matplotlib v([\d.]+\w*),", committed)
        if version is None or version[1].decode() == matplotlib.__version__:
            assert committed == content, f"{path.name}: run `python docs/make_pictures.py`"
        assert ElementTree.fromstring(content).tag.endswith("svg")


def test_every_picture_of_the_page_has_a_caption_and_exists():
    text = PAGE.read_text()
    names = re.findall(r"!\[[^\]]+\]\(\.\./pictures/([^)]+)\)", text)
    assert len(names) > 5
    for name in names:
        assert (DOCS / "pictures" / name).exists()
        assert re.search(rf"\({re.escape(f'../pictures/{name}')}\)\n\n\*[^*]+\*\n", text), name


def test_the_readme_draws_the_final_runs_that_there_are(tmp_path):
    made = script("make_pictures")
    assert b"seed" not in made.readme(tmp_path)
    for name, seeds in (("omniglot-cnn2-maml", 3), ("omniglot-cnn2-kfo", 3), ("omniglot-cnn2-kfo-decayed", 1)):
        results = Results(ENTRIES[name], made.BUDGET, tmp_path, ENTRIES)
        assert isinstance(results.work, Halving) == ("decayed" not in name) and made.BUDGET in BUDGETS
        while stage := results.work.missing(results.records):
            # The final runs are those that are tested.
            final = bool(stage[0].tests)
            for job in stage[: seeds if final else None]:
                results.records[job.key] = record(job, lambda settings, at: at / 4000 + settings["fast_lr"] / 100)
            if final:
                break
        results._write()
    assert {method: seeds for method, (_, seeds) in made.lines(tmp_path).items()} == {"kfo": 1, "maml": 3}
    drawn = made.readme(tmp_path)
    assert b"META-KFO (1 seed)" in drawn and b"MAML (3 seeds)" in drawn


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The figures of the committed result of `kfo bench`, by the name of the file, and the folder of the files."""
    figures, folder, save = {}, tmp_path_factory.mktemp("pictures"), plots._save

    def keep(figure, path):
        figures[path.name] = figure
        return save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", keep)
        plots.draw(report.read(MEASURED), folder, f"{MEASURED.stem}-")
    return figures, folder


def test_the_pictures_of_kfo_bench_are_those_of_the_result(drawn):
    figures, folder = drawn
    for name in figures:
        committed, made = (Image.open(place / name) for place in (DOCS / "pictures", folder))
        if committed.text["Software"] == made.text["Software"]:
            same = committed.convert("RGB").tobytes() == made.convert("RGB").tobytes()
            assert same, f"{name}: run `python bench/plot_results.py`"


def test_names_of_a_roofline_cover_nothing(drawn):
    figure = drawn[0]["transform_cpu-roofline.png"]
    figure.draw_without_rendering()
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.get_children() if isinstance(text, Annotation)]
        points = [at for drawn in panel.collections for at in panel.transData.transform(drawn.get_offsets())]
        assert len(boxes) >= 4
        for box in boxes:
            assert panel.bbox.containsx(box.x0) and panel.bbox.containsx(box.x1) and not box.count_contains(points)
        assert not any(box.overlaps(other) for box, other in combinations(boxes, 2))


def test_providers_differ_in_grey(drawn):
    """By dashes, marker or filling: no two curves of a panel are of one kind."""
    for name, figure in drawn[0].items():
        for panel in figure.axes if "time" in name else ():
            looks = [
                (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white") for line in panel.lines
            ]
            assert looks and not any(one == other for one, other in pairwise(sorted(looks)))
