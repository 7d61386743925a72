"""`kfo runs` and `kfo plot`: what they say of runs, and of files that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deadlines import seconds
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kfo_ext.runs import plots, scores
from kfo_ext.trainer import mean_interval

TINY = [
    "--dataset", "glyphs", "--layers", "1", "--hidden", "4", "--ways", "2", "--shots", "1", "--queries", "2",
    "--steps", "1", "--meta-batch", "2", "--iterations", "3", "--validation-every", "2", "--validation-tasks", "4",
    "--threads", "1",
]  # fmt: skip


@pytest.fixture
def trained(kfo):
    """Two runs, one of them evaluated."""
    assert kfo("train", "--run", "runs/a", *TINY)[0] == 0
    assert kfo("train", "--run", "runs/deep/b", *TINY, "--update", "none", "--seed", 3)[0] == 0
    assert kfo("eval", "runs/a", "--tasks", 6)[0] == 0
    return kfo


def best(run: str) -> str:
    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in records if "validation_accuracy" in record]
    score = max(record["validation_accuracy"] for record in validations)
    first = next(record["iteration"] for record in validations if record["validation_accuracy"] == score)
    return f"accuracy {score:.4f} at {first}"


def test_runs_and_their_scores(trained):
    code, out, err = trained("runs")
    assert (code, err) == (0, "")
    head, *rows = [line.split("  ") for line in out.splitlines()]
    head, *rows = [[cell.strip() for cell in row if cell.strip()] for row in (head, *rows)]
    score = json.loads(Path("runs/a/eval-test-best.json").read_text())
    assert head == ["run", "data", "method", "update", "iterations", "validation", "test"]
    assert rows == [
        ["runs/a", "glyphs", "maml", "kfo", "3 of 3", best("runs/a"),
         f"accuracy {score['mean']:.4f} ± {score['interval']:.4f} (6 tasks)"],
        ["runs/deep/b", "glyphs", "maml", "none", "3 of 3", best("runs/deep/b"), "not evaluated"],
    ]  # fmt: skip
    assert [line.split()[0] for line in trained("runs", "runs/deep")[1].splitlines()] == ["run", "runs/deep/b"]
    assert trained("runs", "runs/a/nothing")[2] == "kfo: runs/a/nothing: there is no such folder\n"
    Path("empty").mkdir()
    assert trained("runs", "empty")[:2] == (0, "no runs in empty\n")


def test_a_score_of_an_older_checkpoint_says_so(trained):
    Path("runs/a/best.pt").write_bytes(Path("runs/a/last.pt").read_bytes().replace(b"checkpoint 2 ", b"checkpoint 2 0"))
    assert "(6 tasks, of an older checkpoint)" in trained("runs")[1]


DAMAGED = {
    "config.json": ("{", "not a readable JSON file"),
    "metrics.jsonl": ("nonsense\n{}\n", "line 1 is not a record of metrics"),
    "eval-test-best.json": ('{"mean": 0.9}', "not an evaluation written by kfo"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_the_others_are_shown(name, trained):
    content, message = DAMAGED[name]
    Path("runs/a", name).write_text(content)
    code, out, err = trained("runs")
    assert code == 0
    assert f"runs/a/{name}: " in err and message in err
    assert "runs/a " in out and best("runs/deep/b") in out


def test_the_list_needs_no_torch(trained):
    code = """
import sys
from kfo_ext.cli import main
sys.argv = ["kfo", "runs"]
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(60))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == trained("runs")[1]


def test_scores_that_are_not_those_of_their_tasks_are_refused():
    values = torch.randn(50, dtype=torch.float64)
    mean, half = mean_interval(values)
    content = {
        "measure": "loss", "mean": mean, "interval": half, "checkpoint": "best", "iteration": 3,
        "checkpoint_digest": "", "settings": {}, "changes": {}, "task_list": {"split": "test", "tasks": 50},
        "scores": values.tolist(),
    }  # fmt: skip
    assert scores.fault(content, "test", "best") == ""
    for name, wrong in (("mean", mean + 1e-6), ("interval", half * 1.0001)):
        assert "not those of its scores" in scores.fault({**content, name: wrong}, "test", "best")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    found: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (found.append(figure), save(figure, *a, **k)))
    return found


def test_curves_of_several_runs_in_one_picture(trained, figures):
    for out, start in (("curves.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")):
        assert trained("plot", "runs/a", "runs/deep/b", "--out", out)[:2] == (0, f"written: {out}\n")
        assert Path(out).read_bytes().startswith(start)
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("meta-iteration", "accuracy on query examples (%)")
    legend = axes.get_legend()
    assert legend.get_title().get_text() == "training: mean of 20 iterations; validation: 95 % intervals"
    names = [f"{run}, {kind}" for run in "ab" for kind in ("training", "validation")]
    assert [text.get_text() for text in legend.get_texts()] == names
    validations = [container.lines[0] for container in axes.containers]
    for line, run in zip(validations, ("runs/a", "runs/deep/b"), strict=True):
        records = [json.loads(text) for text in Path(run, "metrics.jsonl").read_text().splitlines()]
        values = [100 * record["validation_accuracy"] for record in records if "validation_accuracy" in record]
        assert list(line.get_ydata()) == pytest.approx(values)
    # Without colour, lines and markers tell them apart.
    first, second = validations
    assert first.get_marker() != second.get_marker() and first.get_linestyle() != second.get_linestyle()


def test_no_two_runs_look_alike_in_grey():
    assert len({(i % len(plots.LINES), i % len(plots.MARKERS)) for i in range(12)}) == 12
    assert all(sum(to_rgb(colour)) / 3 < 0.75 for colour in plots.PALETTE), "too light for paper"


def test_pictures_that_cannot_be(trained):
    waves = " ".join(TINY).replace("glyphs --layers 1", "sinusoid").replace("--ways 2 ", "")
    assert trained("train", "--run", "runs/waves", *waves.split())[0] == 0
    Path("runs/fresh").mkdir()
    Path("runs/fresh/config.json").write_bytes(Path("runs/a/config.json").read_bytes())
    for arguments, message in (
        (["runs/a", "--out", "curves.gif"], "curves.gif: expected the name of a picture, which ends in .png, .svg"),
        (["runs/a", "runs/waves"], "runs: expected one measure, got the accuracy of a and the loss of waves"),
        (["runs/a", "runs/fresh"], "runs/fresh: has no metrics.jsonl yet"),
        (["nowhere"], "nowhere: there is no such run folder"),
    ):
        code, _, err = trained("plot", *arguments)
        assert (code, err.count("\n")) == (2, 1) and message in err
    assert not Path("curves.png").exists()
