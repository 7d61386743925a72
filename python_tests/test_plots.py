"""Learning curves of runs whose names matplotlib would read as something else."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from kfo_ext.runs import plot_runs

METRICS = """{"iteration": 1, "loss": 2.0}
{"iteration": 2, "loss": 1.0}
{"iteration": 2, "validation_loss": 2.0, "validation_loss_interval": 0.1}
"""
# Name of a run to how it is shown.
NAMES = {
    "$x^2$": "$x^2$",
    "$\\frac{$": "$\\frac{$",
    "a\\$b": "a\\$b",
    "_hidden": "_hidden",
    "a\udcffb": "a\\udcffb",
    "a\nb\tc": "a b c",
    "\u5b57": "\u5b57",
    "%d {0}": "%d {0}",
    "a" * 300 + "z": "..." + "a" * 49 + "z",
}


@pytest.fixture
def shown(monkeypatch):
    """The names in the legend of the last picture, with whether they are read as formulas."""
    texts = []
    save = Figure.savefig

    def keep(figure, *args, **options):
        save(figure, *args, **options)
        texts[:] = [(text.get_text(), text.get_parse_math()) for text in figure.axes[0].get_legend().get_texts()]

    monkeypatch.setattr(Figure, "savefig", keep)
    return texts


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_drawn_as_they_are(name, shown, tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curve.png"
    metrics.write_text(METRICS)
    plot_runs({name: metrics, "other": metrics}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (f"{NAMES[name]}, training", False) in shown
    assert len(shown) == 4
    assert {text for text, _ in shown} >= {"other, training", "other, validation"}
