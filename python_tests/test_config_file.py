"""Options from a file: TOML, or the config.json of a run; those of the command line count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfo_ext.trainer import Config
from kfo_ext.trainer.config_file import configured

TINY = """dataset = "sinusoid"
hidden = 4
inner_lr = 0.02
steps = 1
meta_batch = 2
iterations = 2
validation_tasks = 2
psd = false
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "options.toml"
    path.write_text(TINY)
    return path


def test_a_run_of_a_file_is_that_of_its_options(toml, kfo):
    assert kfo("train", "--config", toml, "--run", "a", "--steps", 2)[0] == 0
    config = Config.load(Path("a/config.json"))
    assert config == Config(
        dataset="sinusoid", hidden=4, inner_lr=0.02, steps=2, meta_batch=2, iterations=2, validation_tasks=2, psd=False
    )
    # A run's own file, or its folder, gives the same run again.
    for number, source in enumerate(("a/config.json", "a")):
        assert kfo("train", "--config", source, "--run", f"again-{number}")[0] == 0
        assert Config.load(Path(f"again-{number}/config.json")) == config
        assert losses(f"again-{number}") == losses("a")


def losses(run: str) -> list[float]:
    return [json.loads(line).get("loss") for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_another_part_leaves_out_what_the_file_says_of_the_old_one(toml):
    assert "psd" not in configured(toml, {"update": "none"})
    assert configured(toml, {"update": "none"})["inner_lr"] == 0.02
    assert configured(toml, {"hidden": 8})["psd"] is False
    # One that the file alone could not have.
    toml.write_text(TINY.replace("psd = false", "rank = 3"))
    assert configured(toml, {"update": "low_rank"})["rank"] == 3


# Text of the file, options of the command line, and the message, whether it names the file.
REFUSED = {
    "unknown": ("iner_lr = 0.1", {}, "unknown configuration key 'iner_lr'; did you mean 'inner_lr'?", True),
    "dashes": ("inner-lr = 0.1", {}, "unknown configuration key 'inner-lr'; did you mean 'inner_lr'?", True),
    "table": ("[training]\nsteps = 2", {}, "unknown configuration key 'training'", True),
    "type": ('steps = "two"', {}, "steps: expected int, got 'two'", True),
    "value": ("steps = -1", {}, "steps: expected at least 0, got -1", True),
    "part": ('update = "adam"', {}, "update: expected one of none, meta_sgd", True),
    "no-effect": ('update = "none"\npsd = true', {}, "psd: has no effect with update 'none'", True),
    "of-the-command-line": ("steps = 2", {"hidden": -1}, "hidden: expected at least 1, got -1", False),
    "in-both": ("steps = 2", {"steps": -1}, "steps: expected at least 0, got -1", False),
    "needed": ('dataset = "omniglot"', {}, "data_root: data set 'omniglot' needs the folder", False),
    "no-toml": ("steps = ", {}, "not a readable TOML file (Invalid value", True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_with_its_file(case, toml):
    text, given, message, named = REFUSED[case]
    toml.write_text(text)
    with pytest.raises((TypeError, ValueError)) as error:
        configured(toml, given)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{toml}: ") == named


def test_files_that_are_none(kfo, tmp_path):
    Path(tmp_path, "list.json").write_text("[1]")
    for name, message in (
        ("nowhere.toml", "nowhere.toml: there is no such file"),
        ("nowhere.json", "nowhere.json: there is no such file"),
        ("list.json", "list.json: expected a table of options, got list"),
        (".", "config.json: there is no such file"),
    ):
        code, _, err = kfo("train", "--config", name)
        assert (code, err) == (2, f"kfo: {message}\n")
    code, _, err = kfo("train", "--config", "list.json", "--resume", "a")
    assert code == 2 and "--config: a resumed run has its own config.json" in err
    assert {path.name for path in tmp_path.iterdir()} == {"list.json"}
