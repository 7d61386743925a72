"""Lower precision: bfloat16 rounds the forward alone, flags are set back, options without effect are refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from meta_steps import WAVES, WAYS, make_batch, make_learner
from torch import nn

from kfo_ext import MAML
from kfo_ext.ops.conv2d import reference
from kfo_ext.runs import checkpoint
from kfo_ext.trainer import Config, Trainer, evaluate_run, load_learner
from kfo_ext.trainer.meta_step import MetaStep
from kfo_ext.trainer.precision import convolution_precision


def test_the_flag_for_convolutions_is_set_back():
    before = torch.backends.cudnn.allow_tf32
    for precision, expected in {"ieee": False, "bf16": False, "tf32": True}.items():
        with pytest.raises(RuntimeError, match="stop"), convolution_precision(precision):
            assert torch.backends.cudnn.allow_tf32 is expected
            raise RuntimeError("stop")
        assert torch.backends.cudnn.allow_tf32 is before
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32, bf16, got 'fp8'"):
        convolution_precision("fp8").__enter__()


def test_training_and_validation_run_at_the_runs_precision(tmp_path):
    trainer = Trainer.start(Config(**{**WAVES, "iterations": 1}), tmp_path / "run")
    seen = []
    trainer.learner.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    # torch's default.
    with convolution_precision("tf32"):
        trainer.fit()
        assert torch.backends.cudnn.allow_tf32
    assert len(seen) == 1 + 2
    assert not any(seen)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["maml-psd", "anil", "maml-plain"])
def test_bf16_rounds_the_forward_and_nothing_else(kind, channels_last, monkeypatch):
    right, rough = make_learner(kind), make_learner(kind, torch.float32, bf16=True)
    rough.model.channels_last = channels_last
    seen = set()
    true = reference.conv2d

    def conv2d(x, weight, stride, padding, channels_last):
        y = true(x, weight, stride, padding, channels_last)
        seen.add((channels_last, y.dtype))
        return y

    monkeypatch.setattr(reference, "conv2d", conv2d)
    expected = right(make_batch(0))
    seen.clear()
    result = rough(make_batch(0, torch.float32))
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert all(last for last, _ in seen) == channels_last
    for losses in (result.loss, result.support_losses, result.query_losses):
        assert losses.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=0.05, atol=0)
    gradients = [
        torch.cat([g.reshape(-1).double() for g in torch.autograd.grad(loss, list(learner.parameters()))])
        for loss, learner in ((result.loss, rough), (expected.loss, right))
    ]
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert 1e-4 < error < 0.2
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_task_by_task():
    model = nn.Sequential(nn.Flatten(), nn.Linear(162, WAYS))
    rough, right = (MAML(model, lr=0.1, steps=2, bf16=bf16, route="loop") for bf16 in (True, False))
    batch = make_batch(0, torch.float32)
    a, b = rough(batch).loss, right(batch).loss
    assert a.dtype == torch.float32
    assert 1e-6 < abs(a - b) < 0.02


@pytest.mark.parametrize("route", ["auto", "loop"])
def test_bf16_gives_a_head_features_of_float32(route):
    learner = make_learner("anil", torch.float32, bf16=True, route=route)
    assert {features.dtype for features in learner.inputs(make_batch(0, torch.float32))} == {torch.float32}


def test_bf16_needs_float32():
    with pytest.raises(ValueError, match=r"bf16: expected parameters of torch\.float32, .* got torch\.float64"):
        make_learner(bf16=True)(make_batch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph: expected a CUDA device, got 'cpu'"),
        ({"cuda_graph": True, "device": "cuda", "checkpoint_inner": True}, "cuda_graph: expected checkpoint_inner off"),
        ({"precision": "fp8"}, "precision: expected one of ieee, tf32, bf16, got 'fp8'"),
        ({"precision": "tf32"}, "precision: 'tf32' has no effect on device 'cpu'"),
        (
            {"precision": "tf32", "device": "cuda", "dtype": "float64"},
            "precision: 'tf32' has no effect on dtype 'float",
        ),
        ({"precision": "bf16", "dtype": "float64"}, "precision: 'bf16' has no effect on dtype 'float64'"),
        ({"precision": "tf32", "device": "cuda", "dataset": "sinusoid"}, "precision: 'tf32' has no effect on network"),
        ({"channels_last": True}, "channels_last: has no effect on device 'cpu'"),
        (
            {"channels_last": True, "device": "cuda", "dataset": "sinusoid"},
            "channels_last: has no effect with network",
        ),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**options)


def test_a_run_made_fast_on_a_device_is_judged_on_the_cpu(tmp_path):
    trainer = Trainer.start(Config(**{**WAVES, "dataset": "glyphs", "ways": 2}), tmp_path / "run")
    fast = trainer.config.changed(device="cuda", cuda_graph=True, channels_last=True, precision="tf32")
    fast.save(trainer.run.config)
    state = checkpoint.load(trainer.run.last)
    checkpoint.save(trainer.run.last, {**state, "config": fast.to_dict()})
    with pytest.raises(ValueError, match="precision: 'tf32' has no effect on device 'cpu'"):
        load_learner(trainer.run, "last", device="cpu")
    config, _, _ = load_learner(trainer.run, "last", device="cpu", precision="ieee")
    assert not config.cuda_graph
    assert not config.channels_last
    assert evaluate_run(trainer.run, name="last", tasks=2, device="cpu", precision="bf16").tasks == 2
    written = trainer.run.evaluation("test", "last", precision="bf16")
    assert json.loads(written.read_text())["settings"]["precision"] == "bf16"


def test_options_reach_the_learner(tmp_path):
    tiny = {"shots": 2, "queries": 2, "hidden": 4, "steps": 1, "meta_batch": 2, "validation_tasks": 2, "ways": 2}
    config = Config(**tiny, iterations=1, precision="bf16", channels_last=True)
    trainer = Trainer.start(config, tmp_path / "run")
    assert trainer.learner.bf16
    assert trainer.learner.model.channels_last
    assert trainer.fit().reason == "finished"
    assert type(trainer.meta_step) is MetaStep
    assert Config(device="cuda", cuda_graph=True, precision="tf32", channels_last=True).precision == "tf32"
