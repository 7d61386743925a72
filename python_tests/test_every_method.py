"""`kfo train` runs every method on every data set: one iteration of each, on the shared archives where they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.method_cases import CASES
from kfo_ext.runs.metrics import read_metrics
from kfo_ext.trainer import Config, Trainer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL = {"shots": 1, "queries": 2, "steps": 2, "meta_batch": 2, "iterations": 1, "validation_tasks": 2}
IMAGES = {**SMALL, "ways": 2, "hidden": 4}
SETS = {
    "omniglot": {**IMAGES, "data_root": SHARED / "omniglot"},
    "cifar_fs": {**IMAGES, "data_root": SHARED / "cifar_fs"},
    "csv_images": {**IMAGES, "data_root": SHARED / "grocery84" / "grocery84.zip"},
    "glyphs": IMAGES,
    "sinusoid": {**SMALL, "shots": 5, "hidden": 4},
    "linear": SMALL,
    "logistic": SMALL,
}
# The linear models are a head alone, and that of one dimension is one number and a bias.
REFUSED = {
    ("linear", "BOIL"): "adapts all but the head",
    ("logistic", "BOIL"): "adapts all but the head",
    ("linear", "low-rank Cholesky"): "expected one with a side longer than 1",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("data", SETS)
def test_kfo_train_runs_every_method(data, cache, tmp_path):
    given = dict(SETS[data])
    if root := given.get("data_root"):
        if not root.exists():
            pytest.skip("the shared archives are not here")
        given |= {"data_root": str(root), "cache": cache}
    for number, (name, case) in enumerate(CASES.items()):
        options = {**case.options, "rank": 2} if case.options["update"] == "low_rank" else case.options
        run, config = tmp_path / str(number), Config(dataset=data, **given, **options)
        if (data, name) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[data, name]):
                Trainer.start(config, run)
            continue
        trainer = Trainer.start(config, run)
        assert trainer.fit().reason == "finished", name
        assert all(math.isfinite(record["loss"]) for record in read_metrics(run / "metrics.jsonl") if "loss" in record)
