"""The configuration of a run: options that belong to its parts, what it refuses, and how a part is added."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from states import WAVES
from tiny_archives import pixels, png, write_folder
from torch import nn

from kfo_ext.packing import Packing
from kfo_ext.runs import checkpoint
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.trainer import Config, Trainer
from kfo_ext.trainer.config import NOUNS, PARTS, RUN, TABLES, difference, owners
from kfo_ext.trainer.datasets import DATASETS, DataSet
from kfo_ext.trainer.listing import listed
from kfo_ext.trainer.methods import METHODS, Method
from kfo_ext.trainer.networks import NETWORKS, Network
from kfo_ext.trainer.options import Option
from kfo_ext.trainer.recipe import build_learner
from kfo_ext.trainer.updates import UPDATES, LearnedUpdate
from kfo_ext.updates import Update

GLYPHS = {"dataset": "glyphs", "ways": 2, "shots": 2, "queries": 2, "hidden": 4}

BAD = {
    "dataset": (
        "mnist",
        f"dataset: expected one of {', '.join(DATASETS)}, got 'mnist'; if it is yours, run the script that adds it",
    ),
    "update": ("adam", f"update: expected one of {', '.join(UPDATES)}, got 'adam'; it is a choice of optimizer"),
    "method": ("meta_sgd", f"method: expected one of {', '.join(METHODS)}, got 'meta_sgd'; it is a choice of update"),
    "dtype": ("float16", "dtype: expected one of float32, float64, got 'float16'"),
    "ways": (1, "ways: expected at least 2, got 1"),
    "steps": (-1, "steps: expected at least 0, got -1"),
    "inner_lr": (-0.1, "inner_lr: expected a finite number of at least 0, got -0.1"),
    "scale": (math.inf, "scale: expected a finite number above 0, got inf"),
    "clip_norm": (-1.0, "clip_norm: expected a finite number of at least 0, got -1.0"),
    "meta_lr": (math.nan, "meta_lr: expected a finite number above 0, got nan"),
    "device": ("gpu", "device: expected a device of torch such as 'cpu' or 'cuda:0', got 'gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_config_refuses_bad_values(name):
    value, message = BAD[name]
    with pytest.raises(ValueError) as caught:
        Config(**{name: value})
    assert str(caught.value) == message


def test_config_refuses_wrong_types_and_combinations():
    with pytest.raises(TypeError, match="ways: expected int, got True"):
        Config(ways=True)
    with pytest.raises(TypeError, match="ways: expected int, got None"):
        Config(ways=None)
    with pytest.raises(TypeError, match="psd: expected bool, got 'yes'"):
        Config(psd="yes")
    with pytest.raises(ValueError, match=r"scale: has no effect without hidden_layers, expected 1, got 3\.0"):
        Config(scale=3.0)
    with pytest.raises(ValueError, match="data_root: data set 'omniglot' needs the folder or archive that holds"):
        Config(dataset="omniglot")
    with pytest.raises(ValueError, match="data_root: expected text without null characters"):
        Config(dataset="omniglot", data_root="a\0b")
    with pytest.raises(
        ValueError, match=r"network: data set 'glyphs' has examples of shape \(1, 28, 28\), 'sinusoid_m"
    ):
        Config(network="sinusoid_mlp")
    with pytest.raises(ValueError, match="device: 'cuda:99' is not available here"):
        build_learner(Config(device="cuda:99"))


def test_config_round_trip_and_unknown_keys(tmp_path):
    path = tmp_path / "config.json"
    config = Config(**GLYPHS, seed=3)
    config.save(path)
    assert Config.load(path) == config
    path.write_text(json.dumps({**config.to_dict(), "temperature": 0.9}))
    with pytest.raises(
        ValueError, match=r"unknown configuration key 'temperature'; expected one of dataset, .*inner_lr"
    ):
        Config.load(path)
    path.write_text('{"ways": 1}')
    with pytest.raises(ValueError, match=r"config\.json: ways: expected at least 2"):
        Config.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a readable JSON file"):
        Config.load(path)


# What is given, and the part that the option has no effect with.
WITHOUT_EFFECT = [
    ({"update": "none", "hidden_layers": 3}, "update 'none'; it is an option of update kfo"),
    ({"update": "none", "adapt_update": False}, "update 'none'; it is an option of update "),
    ({"update": "none", "psd": True}, "update 'none'; it is an option of update kfo"),
    ({"dataset": "sinusoid", "ways": 5}, "dataset 'sinusoid'; it is an option of data set glyphs, omniglot, "),
    ({"dataset": "sinusoid", "init": "reference"}, "network 'sinusoid_mlp'; it is an option of network omniglot_cnn, "),
    ({"dataset": "sinusoid", "layers": 2}, "network 'sinusoid_mlp'; it is an option of network omniglot_cnn, "),
    ({"data_root": "data"}, "dataset 'glyphs'; it is an option of data set omniglot, "),
    ({"momentum": 0.9}, "optimizer 'adam'; it is an option of optimizer sgd"),
    ({"meta_lr_half_life": 100}, "schedule 'constant'; it is an option of schedule half_life"),
    (
        {"schedule": "step", "meta_lr_every": 5, "meta_lr_end": 0.1},
        "schedule 'step'; it is an option of schedule cosine",
    ),
    ({"dataset": "logistic", "noise": 0.5}, "dataset 'logistic'; it is an option of data set linear"),
]


@pytest.mark.parametrize(("options", "message"), WITHOUT_EFFECT, ids=lambda value: str(value)[:40])
def test_an_option_without_effect_is_refused(options, message, kfo):
    *_, name = options
    message = f"{name}: has no effect with {message}"
    with pytest.raises(ValueError) as caught:
        Config(**options)
    assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match="here: "):
        Config.from_dict(options, "here")
    flags = {True: "", False: "no-"}
    line = [
        text
        for name, value in options.items()
        for text in (
            [f"--{flags[value]}{name.replace('_', '-')}"]
            if isinstance(value, bool)
            else [f"--{name.replace('_', '-')}", str(value)]
        )
    ]
    code, _, err = kfo("train", *line)
    assert (code, err.startswith(f"kfo: {message}"), err.count("\n")) == (2, True, 1), err


def test_a_configuration_holds_what_has_an_effect_and_its_values(tmp_path):
    config = Config(dataset="sinusoid", update="none")
    assert config.to_dict() == {
        "dataset": "sinusoid",
        "network": "sinusoid_mlp",
        "method": "maml",
        "update": "none",
        "optimizer": "adam",
        "weight_decay": 0.0,
        "schedule": "constant",
        "shots": 10,
        "queries": 10,
        "hidden": 32,
        "per_step": False,
        **{name: option.default for name, option in RUN.items()},
        "inner_lr": 0.01,
    }
    config.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()
    for layers, bias in ((0, False), (2, True)):
        assert Config(hidden_layers=layers).bias is bias
        assert Config.from_dict(Config(hidden_layers=layers).to_dict()).bias is bias
    assert Config(hidden_layers=2, bias=False).bias is False
    assert Config(bias=None, network=None) == Config()
    with pytest.raises(AttributeError, match="psd: has no effect with update 'none'; it is an option of update kfo"):
        config.psd  # noqa: B018
    with pytest.raises(AttributeError, match="unknown configuration key 'temperature'"):
        config.temperature  # noqa: B018
    with pytest.raises(AttributeError):
        config.values = {}


def test_an_inner_rate_of_zero_is_one_everywhere():
    """As of torch's optimizers: the unadapted network, for comparison."""
    assert build_learner(Config(inner_lr=0.0)).lr == 0.0


def test_the_options_of_an_update_reach_it():
    config = Config(**GLYPHS, psd=False, hidden_layers=1, scale=20, bias=False, max_factor=8)
    update = build_learner(config).update
    assert update.scale == 20.0
    assert (update.psd, update.has_bias, len(update.layers)) == (False, False, 2)
    assert max(side for factors in update.factors() for X in factors if X is not None for side in X.shape) <= 8
    assert build_learner(Config(**GLYPHS, update="none")).update.phi == ()


def test_a_changed_configuration_takes_the_defaults_of_its_new_parts():
    config = Config(dataset="sinusoid", hidden_layers=2, psd=False, shots=3)
    assert config.changed(shots=4) == Config(dataset="sinusoid", hidden_layers=2, psd=False, shots=4)
    assert config.changed(update="none") == Config(dataset="sinusoid", update="none", shots=3)
    moved = config.changed(dataset="glyphs")
    assert (moved.network, moved.inner_lr, moved.ways, moved.shots) == ("omniglot_cnn", 0.1, 5, 3)
    with pytest.raises(ValueError, match="hidden_layers: has no effect with update 'none'"):
        config.changed(update="none", hidden_layers=2)
    with pytest.raises(ValueError, match=f"update: expected one of {', '.join(UPDATES)}, got 'adam'"):
        config.changed(update="adam")
    assert difference(config, config.changed(update="none")) == "update: expected 'kfo', got 'none'"
    assert difference(config, config.changed(iterations=7, threads=2)) == ""


def test_configurations_copy_compare_and_print():
    config = Config(**GLYPHS)
    for again in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config)), Config(**GLYPHS)):
        assert again == config and hash(again) == hash(config)
    assert config != Config(**GLYPHS, seed=1)
    assert "'ways': 2" in repr(config)


def test_every_option_belongs_to_one_table_and_says_what_it_is():
    own = [name for part in (PARTS, RUN) for name in part]
    tables = [{name for part in table.values() for name in part.options} for table in TABLES.values()]
    assert len(own) + sum(map(len, tables)) == len({*own, *(name for names in tables for name in names)})
    assert list(NOUNS) == list(PARTS) == list(TABLES)
    assert not [option.name for option in listed() if hasattr(Config, option.name)]
    for option in listed():
        kinds = {each.kind for rows in owners(option.name).values() for each in rows.values()}
        assert len(kinds) <= 1, option.name
        assert option.help and option.option.help
    assert sorted(option.name for option in listed()) == sorted([*own, *(name for names in tables for name in names)])


def test_rows_are_those_that_there_are():
    for name, row in DATASETS.items():
        assert row.network in NETWORKS, name
        known = {
            **RUN,
            **{
                option: value
                for table in TABLES.values()
                for p in table.values()
                for option, value in p.options.items()
            },
        }
        assert row.defaults.keys() <= known.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_the_default_network_of_every_data_set_learns_its_tasks(name):
    row = DATASETS[name]
    needed = {"data_root": "nowhere"} if "data_root" in row.options else {}
    config = Config(dataset=name, shots=2, queries=3, steps=1, **needed)
    options = config.options_of(row)
    shape, outputs = row.inputs(options), row.outputs(options)
    targets = {
        "cross_entropy": lambda n: torch.randint(outputs, (2, n)),
        "mse_loss": lambda n: torch.randn(2, n, outputs),
        "binary_cross_entropy_with_logits": lambda n: torch.randint(2, (2, n, outputs)).float(),
    }[row.loss]
    batch = TaskBatch(*(Examples(torch.rand(2, n, *shape), targets(n)) for n in (4, 6)))
    result = build_learner(config)(batch)
    result.check_finite()
    assert (result.metrics is None) == (config.measure == "loss")


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if "data_root" not in row.options])
def test_every_data_set_without_files_trains_and_resumes(name, kfo):
    line = ("--dataset", name, "--steps", 1, "--meta-batch", 2, "--validation-tasks", 2, "--iterations", 2)
    code, _, err = kfo("train", "--run", "run", *line)
    assert (code, err) == (0, "")
    assert kfo("train", "--resume", "run", "--iterations", 3)[0] == 0
    code, out, _ = kfo("eval", "run", "--tasks", 3, "--shots", 4)
    assert code == 0
    assert out.startswith(DATASETS[name].measure)


def test_a_data_set_of_files_trains(kfo, tmp_path):
    names = [
        f"{split}/{split[:2]}{name}/{i}.png" for split in ("train", "val", "test") for name in "abc" for i in range(4)
    ]
    files = {name: png(pixels(number)) for number, name in enumerate(names)}
    write_folder(tmp_path / "tree", files)
    line = ["--dataset", "folders", "--data-root", "tree", "--cache", "cache", "--side", 16, "--ways", 2, "--shots", 1]
    line += ["--queries", 1, "--steps", 1, "--hidden", 4, "--meta-batch", 2, "--validation-tasks", 2, "--iterations", 1]
    code, _, err = kfo("train", "--run", "run", *line)
    assert (code, err) == (0, "")
    config = Config.load(tmp_path / "run" / "config.json")
    assert (config.side, config.data_root, config.network, config.splits) == (16, "tree", "pooled_cnn", None)
    assert config.inner_lr == 0.01
    (tmp_path / "tree").rename(tmp_path / "moved")
    code, out, err = kfo("eval", "run", "--tasks", 3, "--data-root", "moved")
    assert (code, err) == (0, "")
    assert "written: run/eval-test-best.json" in out


class Scaled(Update):
    """An update of one learned number: U(g) = scale * g."""

    def __init__(self, parameters, start: float) -> None:
        super().__init__(Packing.of(list(parameters)))
        self.scale = nn.Parameter(torch.full((1, 1), start))

    @property
    def phi(self):
        return (self.scale,)

    def rule(self, phi, G):
        return phi[0] * G


class Lines:
    """Tasks y = a x in two dimensions."""

    def __init__(self, split: str, *, seed: int, shots: int, queries: int, slope: float) -> None:
        self.seed, self.sizes, self.slope = seed, (shots, queries), slope

    def sample(self, index: int, tasks: int):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        a = self.slope * torch.randn(tasks, 2, 1, generator=generator)
        xs = [torch.randn(tasks, size, 2, generator=generator) for size in self.sizes]
        return TaskBatch(*(Examples(x, x @ a) for x in xs))


def _with_a_layer(network: nn.Module, *, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), network)


def test_a_part_of_each_table_is_one_row(tmp_path, monkeypatch):
    """A data set, a network, a method and an update of a user's own, each by a row, meta-trained and resumed."""
    monkeypatch.setitem(
        DATASETS,
        "lines",
        DataSet(
            help="lines",
            make=Lines,
            on_device=False,
            options={
                **DATASETS["sinusoid"].options,
                "slope": Option(kind=float, default=2.0, help="spread of the slopes"),
            },
            inputs=lambda options: (2,),
            outputs=lambda options: 1,
            loss="mse_loss",
            measure="loss",
            network="linear",
            defaults={"inner_lr": 0.02, "width": 3},
        ),
    )
    width = {"width": Option(kind=int, default=8, help="units in front", least=1)}
    monkeypatch.setitem(
        NETWORKS,
        "linear",
        Network(help="one layer", make=lambda inputs, outputs: nn.Linear(3, outputs), inputs=(None,)),
    )
    monkeypatch.setitem(
        METHODS,
        "deeper",
        Method(
            help="a layer in front",
            transformed=_with_a_layer,
            options=width,
            adapted=METHODS["maml"].adapted,
            learner=METHODS["maml"].learner,
        ),
    )
    start = {"start": Option(kind=float, default=1.0, help="of the scale", positive=True)}
    monkeypatch.setitem(UPDATES, "scaled", LearnedUpdate(help="one number", make=Scaled, options=start))
    given = {"method": "deeper", "update": "scaled", "start": 0.5, "iterations": 2, "meta_batch": 3}
    config = Config(dataset="lines", **given, validation_tasks=2)
    assert (config.slope, config.width, config.start, config.inner_lr) == (2.0, 3, 0.5, 0.02)
    trainer = Trainer.start(config, tmp_path / "run")
    before = [p.detach().clone() for p in trainer.learner.parameters()]
    assert trainer.fit().reason == "finished"
    assert all(not torch.equal(*pair) for pair in zip(before, trainer.learner.parameters()))
    assert Config.load(trainer.run.config) == config
    assert Trainer.resume(tmp_path / "run", iterations=3).fit().progress.iteration == 3
    assert checkpoint.load(trainer.run.last)["config"]["slope"] == 2.0
    with pytest.raises(ValueError, match="width: has no effect with method 'maml'; it is an option of method deeper"):
        Config(dataset="lines", width=3)


ADAPTED = {
    "maml": lambda name: True,
    "anil": lambda name: name.startswith("head."),
    "boil": lambda name: not name.startswith("head."),
    "tnet": lambda name: name.rpartition(".")[2] in ("W", "b"),
    "linnet": lambda name: True,
    "anil_linnet": lambda name: name.startswith("model.head."),
}


@pytest.mark.parametrize("update", UPDATES)
def test_every_update_trains_and_resumes(update, tmp_path):
    per_step = {"per_step": True} if "per_step" in UPDATES[update].options else {}
    given = {
        **GLYPHS,
        "update": update,
        "iterations": 1,
        "meta_batch": 2,
        "validation_tasks": 2,
        "steps": 2,
        **per_step,
    }
    trainer = Trainer.start(Config(**given), tmp_path / "run")
    before = [p.detach().clone() for p in trainer.learner.update.parameters()]
    assert trainer.fit().reason == "finished"
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.learner.update.parameters())) == bool(before)
    assert Trainer.resume(tmp_path / "run", iterations=2).fit().progress.iteration == 2


@pytest.mark.parametrize("update", ["none", "kfo"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_adapts_its_parameters(method, update, tmp_path):
    config = Config(**GLYPHS, method=method, update=update, iterations=1, meta_batch=2, validation_tasks=2)
    trainer = Trainer.start(config, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in trainer.learner.named_parameters()}
    assert trainer.fit().reason == "finished"
    # Everything is meta-learned, but for the biases that batch norm subtracts.
    same = {name for name, p in trainer.learner.named_parameters() if torch.equal(before[name], p)}
    assert all(name.endswith(("conv.bias", "conv.b")) or name.startswith("update.") for name in same)
    adapted = trainer.learner.adapt(trainer.tasks.sample(0, 2).support)
    names = [name for name, _ in trainer.learner.model.named_parameters()]
    assert set(adapted.parameters) == set(filter(ADAPTED[method], names))


def test_options_and_needs_of_methods(monkeypatch):
    with pytest.raises(ValueError, match="method: 'boil' adapts all but the head, and this network is a head alone"):
        build_learner(Config(dataset="linear", method="boil"))
    monkeypatch.setitem(NETWORKS, "plain", Network(help="no head", make=lambda *_: nn.Linear(1, 1), inputs=None))
    with pytest.raises(ValueError, match="method: 'anil' needs a network with a head, 'plain' has none"):
        Config(dataset="sinusoid", network="plain", method="anil")
    with pytest.raises(ValueError, match=r"widths: expected integers with commas between them, got '8,x'"):
        build_learner(Config(**GLYPHS, method="linnet", widths="8,x"))
    for method in ("linnet", "anil_linnet"):
        assert len(build_learner(Config(**GLYPHS, method=method, widths="8,6,7")).model.head) == 4


def test_a_run_is_not_resumed_with_another_part(tmp_path):
    Trainer.start(Config(**WAVES), tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration \(update: expected 'none', got 'kfo'\)"):
        Trainer.resume(tmp_path / "run", update="none")
    with pytest.raises(ValueError, match="steps: expected at least 1 to train with, got 0"):
        Trainer.start(Config(**{**WAVES, "steps": 0}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
