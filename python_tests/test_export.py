"""Exports of a run, states that load in every way torch has, and the format that later versions must read."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import shutil

import pytest
import torch
from run_fixture import CHECKPOINTS, FILES, FOLDER, continued, losses, parameters_digest
from safetensors import torch as safetensors
from states import WAVES, assert_same
from torch import nn
from update_table import STEPS, UPDATES, random_phi

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.runs import RunFolder, checkpoint
from kfo_ext.runs.metrics import read_metrics
from kfo_ext.trainer import Config, Trainer, evaluate, export, export_run, from_pretrained, load_learner
from kfo_ext.trainer.networks import NETWORKS, Network
from kfo_ext.trainer.recipe import build_family

GLYPHS = {
    "layers": 1, "hidden": 2, "ways": 2, "shots": 1, "queries": 1, "steps": 2, "meta_batch": 2, "validation_tasks": 2,
    "iterations": 2, "validation_every": 2,
}  # fmt: skip
KINDS = {
    "waves-kfo": {**WAVES, "psd": False, "hidden_layers": 1, "scale": 3.0},
    "glyphs-anil-low_rank": {**GLYPHS, "method": "anil", "update": "low_rank"},
    "glyphs-tnet-per_step": {**GLYPHS, "method": "tnet", "update": "meta_sgd", "per_step": True},
    "waves-none": {**WAVES, "update": "none", "dtype": "float64"},
}


def finished(path, **options) -> RunFolder:
    trainer = Trainer.start(Config(**options), path)
    trainer.fit()
    return trainer.run


@pytest.fixture(scope="module")
def waves(tmp_path_factory) -> RunFolder:
    return finished(tmp_path_factory.mktemp("waves") / "run", **KINDS["waves-kfo"])


@pytest.fixture
def exported(waves, tmp_path):
    """An export that a test may change."""
    export_run(waves, tmp_path / "exported")
    return tmp_path / "exported"


def rewritten(folder, tensors=None, **changes) -> None:
    """An export whose digests are right, with other tensors of the update or another config.json."""
    if tensors is not None:
        safetensors.save_file(tensors, folder / "update.safetensors")
    content = json.loads((folder / "config.json").read_text()) | changes
    content["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in content["files"]}
    del content["digest"]
    content["digest"] = export._digest(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_learner_of_the_checkpoint(kind, name, tmp_path, kfo):
    run = finished(tmp_path / "run", **KINDS[kind])
    code, out, _ = kfo("export", run.path, "--to", tmp_path / "a" / "b", "--checkpoint", name)
    assert code == 0
    files = ["model.safetensors", "update.safetensors", "config.json"]
    assert out.splitlines() == [f"written: {tmp_path / 'a' / 'b' / file}" for file in files]
    assert sorted(os.listdir(tmp_path / "a" / "b")) == sorted(files)
    config, expected, progress = load_learner(run, name)
    torch.manual_seed(99)
    random = torch.get_rng_state()
    learner = from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), random)
    assert type(learner) is type(expected)
    assert_same(dict(learner.state_dict()), dict(expected.state_dict()))
    family = build_family(config, "test", seed=0)
    assert_same(evaluate(learner, family, tasks=4)._asdict(), evaluate(expected, family, tasks=4)._asdict())
    # Each file by itself, into plain modules.
    for part, file in zip((expected.model, expected.update), files):
        tensors = safetensors.load_file(tmp_path / "a" / "b" / file)
        own = {key: value for key, value in part.state_dict().items() if "_extra_state" not in key}
        assert_same(tensors, own)
        copy.deepcopy(part).load_state_dict(tensors, strict=False)
    content = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    validation = next(
        r for r in read_metrics(run.metrics) if r["iteration"] == progress.iteration and "validation_loss" in r
    )
    assert content["validation_score"] == validation[f"validation_{config.measure}"]
    assert (content["iteration"], content["measure"]) == (progress.iteration, config.measure)
    assert (content["version"], content["torch"]) == (1, torch.__version__)
    assert content["config"] == Config.load(run.config).to_dict()


def test_the_score_of_a_checkpoint_that_is_not_the_best(tmp_path):
    """The best of this run is at iteration 2, its last at 4."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(FOLDER / "run-0.1.0", run.path)
    records = {r["iteration"]: r for r in read_metrics(run.metrics) if "validation_loss" in r}
    for name, iteration in (("best", 2), ("last", 4)):
        export_run(run, tmp_path / name, name=name)
        content = json.loads((tmp_path / name / "config.json").read_text())
        assert content["iteration"] == iteration
        assert content["validation_score"] == records[iteration]["validation_accuracy"]
    assert records[2]["validation_accuracy"] != records[4]["validation_accuracy"]
    run.metrics.unlink()
    export_run(run, tmp_path / "unknown", name="last")
    assert json.loads((tmp_path / "unknown" / "config.json").read_text())["validation_score"] is None


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x.expand(*x.shape[:-1], self.head.in_features)).tanh()).tanh())


def test_tied_parameters_are_written_under_each_name_and_tied_again(tmp_path, monkeypatch):
    tied = Network(help="tied", make=lambda inputs, outputs: Tied(3), inputs=(1,))
    monkeypatch.setitem(NETWORKS, "tied", tied)
    options = {name: value for name, value in WAVES.items() if name != "hidden"}
    run = finished(tmp_path / "run", **options, network="tied")
    export_run(run, tmp_path / "to")
    tensors = safetensors.load_file(tmp_path / "to" / "model.safetensors")
    assert torch.equal(tensors["first.weight"], tensors["second.weight"])
    learner = from_pretrained(tmp_path / "to")
    assert learner.model.first.weight is learner.model.second.weight
    assert_same(dict(learner.state_dict()), dict(load_learner(run, "best")[1].state_dict()))


def test_changes_for_an_export_are_those_for_a_run(exported):
    assert from_pretrained(exported, steps=7).steps == 7
    with pytest.raises(ValueError, match="hidden: expected 4 as in training"):
        from_pretrained(exported, hidden=5)
    with pytest.raises(ValueError, match="iterations: has no effect on an evaluation"):
        from_pretrained(exported, iterations=5)


def test_a_taken_folder_is_refused_and_stays(waves, tmp_path, kfo):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "notes").write_text("mine")
    (tmp_path / "file").touch()
    export_run(waves, tmp_path / "twice")
    for name, reason in (
        ("to", "is not empty; expected an absent or empty folder"),
        ("twice", "already holds an export"),
        ("file", "expected a folder for the export, got a file"),
    ):
        code, out, err = kfo("export", waves.path, "--to", tmp_path / name)
        assert (code, out) == (2, "")
        assert err.startswith(f"kfo: {tmp_path / name}: ") and reason in err
    assert os.listdir(tmp_path / "to") == ["notes"]
    assert (
        kfo("export", tmp_path / "none", "--to", "x")[2] == f"kfo: {tmp_path / 'none'}: there is no such run folder\n"
    )
    assert "--to" in kfo("export", waves.path)[2]
    assert "expected best or last, got 'first'" in kfo("export", waves.path, "--to", "x", "--checkpoint", "first")[2]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_export_leaves_nothing(there, waves, tmp_path, monkeypatch):
    if there:
        (tmp_path / "to").mkdir()

    def full(path, content):
        raise OSError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(waves, tmp_path / "to")
    assert (tmp_path / "to").exists() == there
    assert not there or not os.listdir(tmp_path / "to")


def test_every_damage_is_refused(exported, tmp_path):
    for file in sorted(exported.iterdir()):
        whole = file.read_bytes()
        flips = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
        for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", *flips):
            if damaged.strip() == whole.strip():
                continue
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
                from_pretrained(exported)
            assert "\n" not in str(caught.value)
        file.unlink()
        with pytest.raises(ValueError, match=f"{re.escape(file.name)}|unfinished"):
            from_pretrained(exported)
        file.write_bytes(whole)
    from_pretrained(exported)


def test_foreign_folders_are_refused(exported, waves, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"not an export of kfo, or an unfinished one: it has no config\.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"it is a run: write it by `kfo export {re.escape(str(waves.path))} --to"):
        from_pretrained(waves.path)
    (exported / "config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(ValueError, match=r"config\.json: not of an export of kfo$"):
        from_pretrained(exported)


def test_a_newer_format_is_named(exported):
    rewritten(exported, version=2, kfo_ext="9.0")
    with pytest.raises(ValueError, match=r"export version 2, this kfo_ext reads up to 1; .* newer kfo_ext, 9\.0"):
        from_pretrained(exported)


def test_right_digests_do_not_stand_for_right_values(exported, monkeypatch):
    """What a tool wrote anew, with digests of its own."""
    update = safetensors.load_file(exported / "update.safetensors")
    made_for = json.loads((exported / "config.json").read_text())["made_for"]
    for tensors, reason in (
        ({**update, "layers.0.R": torch.zeros(1, 3)}, r"update\.layers\.0\.R: expected \(1, \d+\) .*, got \(1, 3\)"),
        ({**update, "layers.0.R": update["layers.0.R"].double()}, r"update\.layers\.0\.R: .*got .*float64"),
        ({name: X for name, X in update.items() if name != "layers.0.R"}, r"lacks parameter 'update\.layers\.0\.R'"),
        ({**update, "layers.7.R": torch.zeros(1)}, r"foreign parameter 'update\.layers\.7\.R'"),
    ):
        rewritten(exported, tensors)
        with pytest.raises(ValueError, match=f"{re.escape(str(exported))}: .*{reason}"):
            from_pretrained(exported)
    # psd has the same sizes: what the meta-parameters were made for tells them apart.
    other = {"update._extra_state": {**made_for["update._extra_state"], "psd": True}}
    rewritten(exported, update, made_for=other)
    with pytest.raises(ValueError, match="meta-parameters with psd=False, got psd=True"):
        from_pretrained(exported)
    rewritten(exported, made_for={})
    with pytest.raises(ValueError, match=r"lacks parameter 'update\._extra_state'"):
        from_pretrained(exported)
    rewritten(exported, made_for={"update._extra_state": 3})
    with pytest.raises(ValueError, match="no valid config, made_for or files"):
        from_pretrained(exported)
    rewritten(exported, update, made_for=made_for)
    from_pretrained(exported)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_loading_runs_no_code(exported, monkeypatch):
    monkeypatch.chdir(exported)
    for content in (pickle.dumps(Bomb()), b"meow"):
        (exported / "update.safetensors").write_bytes(content)
        rewritten(exported)
        with pytest.raises(ValueError, match=r"update\.safetensors: not a safetensors file"):
            from_pretrained(exported)
    assert not (exported / "exploded").exists()


class Headed(nn.Module):
    """A network with a head, and parameters of one to four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, (2, 3)), nn.BatchNorm2d(4, track_running_stats=False))
        self.head = nn.Linear(4, 3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((-1, -2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def made(kind: type[MAML], name: str) -> MAML:
    model = Headed().double()
    named = model.named_parameters() if kind is MAML else model.head.named_parameters()
    make = UPDATES[name].make
    # The patterns of KFO's `only` are of the table's names.
    pairs = [(f"head.{key}" if kind is ANIL else key, parameter) for key, parameter in named]
    return kind(model, update=make(pairs), lr=0.1, steps=STEPS)


def randomised(learner: MAML) -> MAML:
    with torch.no_grad():
        for row, other in zip(learner.update.phi, random_phi(learner.update)):
            row.copy_(other)
    return learner


def bare(state: dict) -> dict:
    return {key: value for key, value in state.items() if "_extra_state" not in key}


@pytest.mark.parametrize("kind", [MAML, ANIL])
@pytest.mark.parametrize("name", UPDATES)
def test_every_update_loads_in_every_way(name, kind):
    source = randomised(made(kind, name))
    state = source.state_dict()
    images = torch.randn(3, 1, 4, 5, dtype=torch.float64), torch.arange(3)
    expected = source.adapt(images).parameters
    with torch.device("meta"):
        assigned, bare_assigned, emptied = made(kind, name), made(kind, name), made(kind, name)
        assert assigned.load_state_dict(state, assign=True) == ([], [])
    missing, unexpected = bare_assigned.load_state_dict(bare(state), strict=False, assign=True)
    assert set(missing) == {key for key in state if "_extra_state" in key}
    assert not unexpected
    emptied.to_empty(device="cpu").load_state_dict(state)
    plain = made(kind, name)
    plain.load_state_dict(bare(state), strict=False)
    for learner in (assigned, bare_assigned, emptied, plain):
        assert_same(dict(learner.state_dict()), dict(state))
        assert all(parameter.requires_grad for parameter in learner.parameters())
        assert_same(learner.adapt(images).parameters, expected)
    if missing:
        with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state[\s\S]*made for.*strict=False"):
            plain.load_state_dict(bare(state))
        own = {key.removeprefix("update."): value for key, value in bare(state).items() if key.startswith("update.")}
        with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state[\s\S]*made for.*strict=False"):
            plain.update.load_state_dict(own)


def test_an_error_of_other_keys_is_torchs_own():
    learner = made(MAML, "kfo")
    state = learner.state_dict()
    del state["model.head.bias"]
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        learner.load_state_dict(state)
    assert "strict=False" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "how"),
    [
        ("cpu", {}),
        ("cpu", {"strict": False}),
        ("cpu", {"assign": True}),
        ("meta", {"assign": True}),
        ("meta", {"assign": True, "strict": False}),
    ],
    ids=str,
)
def test_a_state_of_other_options_never_loads(start, how):
    options = [
        {"bias": True},
        {"bias": True, "psd": False},
        {"hidden_layers": 1},
        {"hidden_layers": 2},
        {"hidden_layers": 1, "scale": 2.0},
        {"hidden_layers": 1, "activation": "relu"},
    ]

    def learner(**own) -> MAML:
        model = Headed()
        return MAML(model, update=KFO(model.named_parameters(), **own), lr=0.1, steps=1)

    states = [learner(**own).state_dict() for own in options]
    with torch.device(start):
        learners = [learner(**own) for own in options]
    for i, mine in enumerate(learners):
        before = dict(mine.update.named_parameters())
        values = [row.clone() for row in before.values()]
        for state in (*states[:i], *states[i + 1 :]):
            with pytest.raises(ValueError, match="state_dict: expected meta-parameters with"):
                mine.load_state_dict(state, **how)
            update = {key.removeprefix("update."): value for key, value in state.items() if key.startswith("update.")}
            with pytest.raises(ValueError, match="state_dict: expected meta-parameters with"):
                mine.update.load_state_dict(update, **how)
        after = dict(mine.update.named_parameters())
        assert all(after[name] is row for name, row in before.items())
        assert start == "meta" or all(torch.equal(row, value) for row, value in zip(after.values(), values))


def test_parameters_that_assignment_unties_are_refused():
    """torch's assign=True makes two parameters of a tied one."""
    model = Tied(3)
    learner = MAML(model, lr=0.1, steps=1, loss=nn.functional.mse_loss)
    learner.load_state_dict(learner.state_dict())
    learner.load_state_dict({key: value.clone() for key, value in learner.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"'second\.weight' was added .* build it again"):
        learner.adapt((torch.randn(3, 1), torch.randn(3, 1)))


RELEASED = sorted(FOLDER.glob("run-*"))


@pytest.fixture(params=RELEASED, ids=lambda path: path.name)
def released(request, tmp_path):
    """A copy of the run of an earlier version, and what must be read of it."""
    for name in FILES:
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(request.param / name, tmp_path / "run")
    return RunFolder.open(tmp_path / "run"), json.loads((request.param / "expected.json").read_text())


def test_a_run_of_each_released_format_is_read_and_goes_on(released, tmp_path):
    assert RELEASED
    run, expected = released
    for name in CHECKPOINTS:
        assert parameters_digest(run.checkpoint(name)) == expected["parameters"][name]
        iteration, values = losses(run, name)
        assert [iteration, pytest.approx(values, rel=1e-4)] == expected["losses"][name]
    export_run(run, tmp_path / "to", name="last")
    assert_same(dict(from_pretrained(tmp_path / "to").state_dict()), dict(load_learner(run, "last")[1].state_dict()))
    records = continued(run)
    assert records == [pytest.approx(record, rel=1e-3) for record in expected["continued"]]
    assert [record["iteration"] for record in records if "loss" in record] == list(range(1, len(records) - 2))


def test_a_later_version_reads_this_format_and_refuses_newer_and_older_ones(waves, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    content = waves.last.read_bytes()
    text = b"checkpoint %d " % checkpoint.VERSION
    path.write_bytes(content.replace(text, b"checkpoint 99 ", 1))
    with pytest.raises(ValueError, match=f"'99', this kfo_ext reads {checkpoint.VERSION}; .* newer kfo_ext: upgrade"):
        checkpoint.load(path)
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 2)
    for version in (b"1", b"02", b"", b"-2", b"2.0"):
        path.write_bytes(content.replace(text, b"checkpoint %s " % version, 1))
        with pytest.raises(ValueError, match=r"checkpoint version '.*', this kfo_ext reads 2 to 4$"):
            checkpoint.load(path)
    path.write_bytes(content)
    assert_same(checkpoint.load(path), checkpoint.load(waves.last))
    state = checkpoint.load(path)
    checkpoint.save(path, state)
    assert path.read_bytes().startswith(b"kfo_ext checkpoint 4 ")
    assert_same(checkpoint.load(path), state)
