"""The files of results: what names their commit, and that they are written whole or not at all."""

from __future__ import annotations

import argparse
import json
import math

import pytest

from kfo_ext import machine
from kfo_ext.bench import result

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("commit", "name", "warns"),
    [
        (COMMIT, "commit 0123456789ab", False),
        (f"{COMMIT}-dirty", "commit 0123456789ab with uncommitted changes", True),
        (None, "of no known commit", True),
    ],
)
def test_provenance(commit, name, warns, monkeypatch, capsys):
    monkeypatch.setattr(result, "run_environment", lambda: {"commit": commit, "command": "c"})
    facts = result.facts_of(argparse.Namespace(tasks=2, out="o"))
    assert facts["settings"] == {"tasks": 2} and facts["command"] == "c" and facts["torch_threads"] >= 1
    assert result.provenance(facts) == name
    said = capsys.readouterr().err
    assert (name in said and said.startswith("WARNING")) is warns


def test_a_copy_without_gits_folder_may_be_told_its_commit(monkeypatch):
    def no_git(*_arguments, **_options):
        raise OSError

    monkeypatch.setattr(machine.subprocess, "run", no_git)
    monkeypatch.delenv("KFO_COMMIT", raising=False)
    assert machine.environment()["commit"] is None
    monkeypatch.setenv("KFO_COMMIT", COMMIT)
    assert machine.environment()["commit"] == COMMIT


def test_a_result_is_written_before_its_table(tmp_path):
    out = tmp_path / "new" / "r.json"

    def fails(content):
        raise KeyError("no such column")

    with pytest.raises(KeyError):
        result.write_result(out, {"a": 1}, fails)
    assert json.loads(out.read_text()) == {"a": 1}
    result.write_result(out, {"a": 2}, lambda content: f"a is {content['a']}\n")
    assert out.with_suffix(".md").read_text() == "a is 2\n"
    with pytest.raises(ValueError, match="JSON"):
        result.write_result(out, {"a": math.nan}, lambda content: "never")
    assert json.loads(out.read_text()) == {"a": 2}
    assert sorted(path.name for path in out.parent.iterdir()) == ["r.json", "r.md"]


def test_finite():
    assert [result.finite(x) for x in (1.5, math.nan, math.inf, -math.inf)] == [1.5, None, None, None]


def test_a_row_is_a_line(tmp_path):
    content = {
        "commit": None,
        "load": [1.5, 2.5],
        "settings": {"out": "a\nb", "sizes": [1]},
        "rows": [{"name": "x", "seconds": {"median": 1e-3}}, {"name": "y"}],
        "networks": [{"name": "n", "rows": [[1, 2], [3, 4]]}],
        "empty": [],
    }
    result.write_rows(tmp_path / "r.json", content)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == content
    assert text.splitlines()[1:4] == [
        ' "commit": null,',
        ' "load": [1.5, 2.5],',
        ' "settings": {"out": "a\\nb", "sizes": [1]},',
    ]
    assert '  {"name": "x", "seconds": {"median": 0.001}},' in text.splitlines() and "    [3, 4]" in text.splitlines()
    with pytest.raises(ValueError, match="json: Out of range float"):
        result.write_rows(tmp_path / "r.json", {"rows": [[math.nan]]})
    assert json.loads((tmp_path / "r.json").read_text()) == content
