"""The task families by name, one line each; torch is imported only when a family is made."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from kfo_ext.tasks import options as of

if TYPE_CHECKING:
    import torch

    from kfo_ext.tasks.batch import TaskFamily


class Family(NamedTuple):
    """A line of the table.

    Attributes:
        path: module and name of the family's class.
        options: its options, a frozen dataclass: names, defaults, bounds and help texts.
        help: the help text, one line.
        on_device: whether the family keeps its images, and makes its tasks, on a device.
    """

    path: str
    options: type[of.FamilyOptions]
    help: str
    on_device: bool

    @property
    def make(self) -> Callable[..., TaskFamily]:
        """The family's class, to be called with split=, seed=, its options, and device= if on_device."""
        module, name = self.path.split(":")
        return getattr(importlib.import_module(f"kfo_ext.tasks.{module}"), name)


FAMILIES: dict[str, Family] = {
    "cifar_fs": Family("datasets.cifar_fs:CifarFs", of.CifarFsOptions, "CIFAR-FS, or CIFAR-100's own archive", True),
    "csv_images": Family("datasets.csv_images:CsvImages", of.CsvImagesOptions, "mini-ImageNet's csv layout", True),
    "folders": Family("datasets.folders:Folders", of.FoldersOptions, "a folder of images per class", True),
    "glyphs": Family("synthetic.glyphs:Glyphs", of.GlyphsOptions, "procedural characters, drawn in memory", True),
    "linear": Family("synthetic.linear:Linear", of.LinearOptions, "linear regression in one dimension", False),
    "logistic": Family("synthetic.logistic:Logistic", of.LogisticOptions, "two classes, a linear boundary", False),
    "omniglot": Family("datasets.omniglot:Omniglot", of.OmniglotOptions, "handwritten characters", True),
    "sinusoid": Family("synthetic.sinusoid:Sinusoid", of.SinusoidOptions, "regression on sine waves", False),
}


def make_family(
    name: str, split: str, *, seed: int = 0, device: torch.device | str = "cpu", **options: Any
) -> TaskFamily:
    """Make a task family by name.

    Args:
        name: a key of FAMILIES.
        split: train, validation or test.
        seed: the run's seed.
        device: the device of images and tasks; families of points use the CPU.
        **options: fields of the family's options; families of real data require `root`.

    Returns:
        The family.

    Raises:
        TypeError: an option is unknown or has another type.
        ValueError: the name is unknown or an option is out of range; or the family's constructor raised it.
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
