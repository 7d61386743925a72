"""docs/methods: the code and command lines of every page run; the index names every row, and has the measured table."""

from __future__ import annotations

import json
import re

import pytest
from pages import DOCS, examples, run_example, script

from bench import method_cost
from bench.method_cases import CASES, config_of
from kfo_ext.trainer.methods import METHODS
from kfo_ext.trainer.updates import UPDATES

FOLDER = DOCS / "methods"
INDEX = FOLDER / "README.md"
PAGES = [page for page in sorted(FOLDER.glob("*.md")) if page != INDEX]
NUMBERED = [(page, number) for page in [*PAGES, INDEX] for number in range(len(examples(page)))]
LINES = [line for page in PAGES for line in re.findall(r"^    kfo (train .*)$", page.read_text(), flags=re.MULTILINE)]
# What makes a run as small as can be.
SMALL = "--layers 1 --hidden 4 --steps 1 --meta-batch 2 --iterations 1 --validation-tasks 2 --shots 1 --queries 1"
TINY = ["--tasks", "2", "--steps", "1", "--layers", "1", "--hidden", "4", "--repeats", "1"]

needs_docs = pytest.mark.skipif(not FOLDER.is_dir(), reason="docs/ is not beside the tests")


@pytest.fixture
def measured(monkeypatch):
    """Runs bench/method_cost.py, small, with more arguments."""
    # It would hold for the tests after this one too.
    monkeypatch.setattr(method_cost, "keep_freed_memory", lambda: True)
    return lambda *arguments: method_cost.main([*TINY, *arguments])


@needs_docs
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_has_every_part(page):
    text = page.read_text()
    for part in ("# ", "\n    ", "\nReferences: ", "\n```python\n", "\n## When to use ", "kfo train"):
        assert part in text, part
    for name in re.findall(r"\]\(([^)]*)\)", text):
        assert (FOLDER / name.partition("#")[0]).is_file(), name


@pytest.mark.parametrize(("page", "number"), NUMBERED, ids=[f"{page.stem}-{number}" for page, number in NUMBERED])
def test_the_code_of_a_page_runs(page, number):
    run_example(page, number)


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_a_command_line_of_a_page_runs(line, kfo, tmp_path):
    # A network without blocks takes no sizes of them.
    small = SMALL.partition("--steps")
    sizes = "".join(small[1:]) if "--network" in line else SMALL
    code, _, complaint = kfo(*line.split(), *sizes.split(), "--run", tmp_path / "run")
    assert code == 0, complaint


@needs_docs
def test_the_index_names_every_method_and_update():
    text = INDEX.read_text()
    configs = [config_of(name) for name in CASES]
    assert {config.method for config in configs} == set(METHODS)
    assert {config.update for config in configs} == set(UPDATES)
    for case in CASES.values():
        assert f"`{case.command}`" in text
    for page in PAGES:
        assert f"]({page.name})" in text, page


@needs_docs
def test_the_index_is_that_of_the_tables_and_the_result():
    index = script("make_methods")
    assert index.PAGE.read_text() == index.page(), "python docs/make_methods.py writes it anew"


@needs_docs
def test_the_index_holds_the_measured_table(measured, monkeypatch, tmp_path):
    index, out = script("make_methods"), tmp_path / "cost.json"
    monkeypatch.setattr(index, "RESULT", out)
    assert index.MEASURE in index.page()
    assert measured("--methods", "Meta-SGD", "T-Net", "--no-memory", "--out", str(out)) == 0
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["MAML", "Meta-SGD", "T-Net"]
    for row in rows.values():
        assert row["per_second"] == pytest.approx(1 / row["seconds"]["median"])
        assert row["over_maml"] == pytest.approx(row["seconds"]["median"] / rows["MAML"]["seconds"]["median"])
    table = out.with_suffix(".md").read_text()
    assert f"| Meta-SGD | {rows['Meta-SGD']['per_second']:.2f} |" in table
    assert index.page().endswith(table)


@pytest.mark.parametrize(("ratio", "said"), [(1.3, "none"), (1.31, "Meta-SGD")])
def test_a_target_is_missed_above_it(ratio, said):
    row = {"method": "Meta-SGD", "per_second": 1.0, "over_maml": ratio, "most": 1.3}
    settings = {"layers": 2, "hidden": 32, "tasks": 16, "steps": 5, "repeats": 9, "device": "cpu"}
    facts = {"command": "", "processor": "", "torch": "", "torch_threads": 2, "commit": None}
    text = method_cost.markdown(facts | {"keeps_freed_memory": True, "settings": settings, "rows": [row]})
    assert f"Targets missed: {said}." in text


def test_memory_is_of_a_process_that_runs_the_case(measured, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(method_cost, "of_process", lambda *what: asked.append(what) or {"peak": 2**21})
    assert measured("--methods", "LinNet") == 0
    assert [(module, what["name"]) for module, what in asked] == [
        ("bench.method_cases", "MAML"),
        ("bench.method_cases", "LinNet"),
    ]
    assert asked[1][1]["hidden"] == 4
    assert re.search(r"^\| LinNet .* \| 2 \|$", capsys.readouterr().out, flags=re.MULTILINE)
