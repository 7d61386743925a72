"""The task families by name: one line each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from kfo_ext.tasks.batch import TaskFamily
from kfo_ext.tasks.datasets.cifar_fs import CifarFs, CifarFsOptions
from kfo_ext.tasks.datasets.csv_images import CsvImages, CsvImagesOptions
from kfo_ext.tasks.datasets.folders import Folders, FoldersOptions
from kfo_ext.tasks.datasets.omniglot import Omniglot, OmniglotOptions
from kfo_ext.tasks.options import FamilyOptions
from kfo_ext.tasks.synthetic.glyphs import Glyphs, GlyphsOptions
from kfo_ext.tasks.synthetic.linear import Linear, LinearOptions
from kfo_ext.tasks.synthetic.logistic import Logistic, LogisticOptions
from kfo_ext.tasks.synthetic.sinusoid import Sinusoid, SinusoidOptions


class Family(NamedTuple):
    """A line of the table.

    make: the family's constructor: make(split=, seed=, **options), and device= if on_device
    options: its options, as a frozen dataclass: their names, defaults, bounds and help texts
    help: one line
    on_device: whether the family keeps its images, and makes its tasks, on a device
    """

    make: Callable[..., TaskFamily]
    options: type[FamilyOptions]
    help: str
    on_device: bool


FAMILIES: dict[str, Family] = {
    "cifar_fs": Family(CifarFs, CifarFsOptions, "CIFAR-FS, from its zip or from CIFAR-100's own archive", True),
    "csv_images": Family(CsvImages, CsvImagesOptions, "images listed in csv files, mini-ImageNet's layout", True),
    "folders": Family(Folders, FoldersOptions, "a folder of images per class (tieredImageNet, CUB, your own)", True),
    "glyphs": Family(Glyphs, GlyphsOptions, "procedural characters, a stand-in for Omniglot without data", True),
    "linear": Family(Linear, LinearOptions, "1-D linear regression (the paper, section 4.1)", False),
    "logistic": Family(Logistic, LogisticOptions, "binary classes with a linear boundary (the paper, B.1)", False),
    "omniglot": Family(Omniglot, OmniglotOptions, "handwritten characters, from the official archives", True),
    "sinusoid": Family(Sinusoid, SinusoidOptions, "regression on sine waves", False),
}


def make_family(
    name: str, split: str, *, seed: int = 0, device: torch.device | str = "cpu", **options: Any
) -> TaskFamily:
    """The task family of that name.

    name: a key of FAMILIES
    split: train, validation or test
    seed: the run's seed
    device: where images are kept and tasks are made; families of points draw them on the CPU
    options: fields of the family's options; families of real data need `root`

    Raises: ValueError or TypeError for an unknown name and for options that the family has not or refuses, and what its
    constructor raises.
    """
    if name not in FAMILIES:
        raise ValueError(f"dataset: expected one of {', '.join(FAMILIES)}, got {name!r}")
    row = FAMILIES[name]
    known = [item.name for item in fields(row.options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{unknown[0]}: dataset {name!r} has no such option, but {', '.join(sorted(known))}")
    plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in options.items()}
    checked = row.options(**plain)
    values = {key: getattr(checked, key) for key in known}
    return row.make(split=split, seed=seed, **values, **({"device": device} if row.on_device else {}))
