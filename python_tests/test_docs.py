"""docs/: the code and the command lines of the pages run; the generated pages and tables are those of today.

test_docs_methods.py has docs/methods, test_readme.py the README.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from pages import DOCS, ROOT, examples, run_page, script, small
from tiny_archives import pixels, png, write_folder

from kfo_ext.trainer.config_file import configured
from kfo_ext.trainer.datasets import DATASETS
from kfo_ext.trainer.networks import NETWORKS

PAGES = sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "methods")
NAMES = {page: str(page.relative_to(DOCS)).removesuffix(".md") for page in PAGES}
# test_interop.py runs the blocks of migrating.md one by one, where the libraries that they are about are installed.
CODED = [page for page in PAGES if examples(page) and page.stem != "migrating"]
SESSIONS = {page: re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL) for page in PAGES}
FENCES = {"python", "console", "sh", "text", "toml"}
COMMANDS = ("train", "eval", "compare", "runs", "plot", "export")

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="docs/ is not beside the tests")


@pytest.fixture
def tables():
    """Takes the rows that a page adds out of the tables again."""
    kept = [(table, dict(table)) for table in (NETWORKS, DATASETS)]
    yield
    for table, rows in kept:
        table.clear()
        table.update(rows)


@pytest.fixture
def data(tmp_path):
    """The folders of images that pages name."""

    def tree(folder: str, classes: list[str]) -> None:
        files = {f"{each}/{i}.png": png(pixels(i, side=32)) for each in classes for i in range(2)}
        write_folder(tmp_path / "DATA" / folder, files)

    classes = [[f"{split}-{i}" for i in range(5)] for split in ("train", "val", "test")]
    for split, names in zip(("train", "val", "test"), classes):
        tree(f"birds/{split}", names)
        tree("all", names)
    (tmp_path / "DATA" / "splits.json").write_text(json.dumps(dict(zip(("train", "val", "test"), classes))))
    rows = {split: "".join(f"{split}{i}{n}.jpg,{split}{i}\n" for i in range(5) for n in range(2)) for split in "abc"}
    for split, name in zip("abc", ("train", "val", "test")):
        csv = {f"{name}.csv": f"filename,label\n{rows[split]}".encode()}
        images = {f"images/{split}{i}{n}.jpg": png(pixels(i, side=32), kind="JPEG") for i in range(5) for n in range(2)}
        write_folder(tmp_path / "DATA" / "mini-imagenet", csv | images)


@pytest.mark.parametrize("page", CODED, ids=[NAMES[page] for page in CODED])
def test_the_code_of_a_page_runs(page, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # It would hold for the tests after this one too.
    monkeypatch.setattr("kfo_ext.machine.keep_freed_memory", lambda: True)
    run_page(page)


SESSION_PAGES = [page for page, blocks in SESSIONS.items() if blocks]


@pytest.mark.parametrize("page", SESSION_PAGES, ids=[NAMES[page] for page in SESSION_PAGES])
def test_the_command_lines_of_a_page_run(page, data, kfo, tmp_path, monkeypatch):
    monkeypatch.setenv("KFO_CACHE", str(tmp_path / "cache"))
    lines = [line for block in SESSIONS[page] for line in block.splitlines() if line.strip()]
    for line in lines:
        program, _, rest = line.partition(" ")
        assert program == "kfo" and rest.split()[0] in COMMANDS, line
        code, _, complaint = kfo(*small(rest))
        missing = "DATA/" in line and not (tmp_path / re.search(r"DATA/[\w-]+", line)[0]).exists()
        assert code == (2 if missing else 0), f"{line}: {complaint}"
        assert not missing or "DATA/" in complaint, complaint


def test_options_of_a_file_are_options(tmp_path):
    blocks = [text for page in PAGES for text in re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    assert blocks
    for text in blocks:
        (tmp_path / "options.toml").write_text(text)
        assert configured(tmp_path / "options.toml", {})


def test_every_block_is_of_a_kind_that_runs_or_cannot():
    for page in DOCS.rglob("*.md"):
        fences = re.findall(r"^```(\w*)$", page.read_text(), flags=re.MULTILINE)[::2]
        assert set(fences) <= FENCES, page


def test_the_command_line_page_is_that_of_the_options():
    made = script("make_command_line")
    assert made.PAGE.read_text() == made.page(), "python docs/make_command_line.py writes it anew"


def test_measured_tables_are_those_of_the_results():
    made = script("make_tables")
    used = set()
    for page, text in made.pages().items():
        assert page.read_text() == text, "python docs/make_tables.py writes the tables anew"
        used |= {slot[2] for slot in made.SLOT.finditer(text)}
    assert used == set(made.TABLES)


def constants(path: Path) -> list[str]:
    """The texts of a source file, `...` for what is filled in."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_the_messages_that_are_explained_exist():
    paths = [path for folder in ("kfo_ext", "build_backend") for path in (ROOT / folder).rglob("*.py")]
    there = "\n".join(text for path in paths for text in constants(path))
    page = (DOCS / "guides" / "errors.md").read_text()
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for message in re.findall("`([^`]+)`", row)
    ]
    assert len(messages) > 40
    # A message may be put together of several texts.
    wrong = [m for m in messages if not all(part.strip() in there for part in m.split("..."))]
    assert not wrong
