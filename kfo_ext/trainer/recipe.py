"""From a configuration to the objects it names: task families, and the learner."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kfo_ext.adapt import ANIL, MAML
from kfo_ext.networks import omniglot_cnn, sinusoid_mlp
from kfo_ext.tasks import TaskFamily, make_family
from kfo_ext.updates import KFO

from .config import Config

# Validation and test tasks do not follow the seed of the run: every run is judged on the same lists.
EVALUATION_SEED = 0


def build_family(config: Config, split: str, *, seed: int) -> TaskFamily:
    """The tasks of one split, its images on the run's device (waves are drawn on the CPU, and small).

    split: train, validation or test.
    seed: of the stream of tasks; the classes of a split do not depend on it.
    Raises: ValueError if the device is not there, FileNotFoundError if the data is not.
    """
    options = {"shots": config.shots, "queries": config.queries, "seed": seed}
    if config.dataset != "sinusoid":
        options |= {"ways": config.ways, "device": config.device}
    if config.dataset == "omniglot":
        options["root"] = config.data_root
    return make_family(config.dataset, split, **options)


def build_learner(config: Config) -> MAML:
    """The network and its learned update, initialised from `config.seed`.

    Raises: ValueError if the device is not there.
    """
    torch.manual_seed(config.seed)
    model = _model(config)
    try:
        model.to(config.device, config.torch_dtype)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {config.device!r} is not available here ({error})") from None
    adapted = model if config.method == "maml" else model.head
    update = None
    if config.update == "kfo":
        update = KFO(adapted.named_parameters(), psd=config.psd, bias=config.bias, hidden_layers=config.hidden_layers)
    return (MAML if config.method == "maml" else ANIL)(
        model,
        update=update,
        lr=config.fast_lr,
        steps=config.steps,
        adapt_update=config.adapt_update and update is not None,
        first_order=config.first_order,
        loss=F.mse_loss if config.dataset == "sinusoid" else F.cross_entropy,
        checkpoint=config.checkpoint_inner,
        bf16=config.precision == "bf16",
    )


def _model(config: Config) -> nn.Module:
    if config.dataset == "sinusoid":
        return sinusoid_mlp(hidden=config.hidden)
    return omniglot_cnn(
        config.layers, ways=config.ways, hidden=config.hidden, init=config.init, channels_last=config.channels_last
    )
