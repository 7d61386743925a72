"""Task families: where few-shot tasks come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfo_ext.tasks.batch import SPLITS, Examples, TaskBatch, TaskFamily, batches, generator_for
from kfo_ext.tasks.glyphs import Glyphs
from kfo_ext.tasks.images import ImageClasses
from kfo_ext.tasks.omniglot import Omniglot, download_omniglot
from kfo_ext.tasks.sinusoid import Sinusoid

FAMILIES: dict[str, Callable[..., TaskFamily]] = {"glyphs": Glyphs, "omniglot": Omniglot, "sinusoid": Sinusoid}

__all__ = [
    "FAMILIES",
    "SPLITS",
    "Examples",
    "Glyphs",
    "ImageClasses",
    "Omniglot",
    "Sinusoid",
    "TaskBatch",
    "TaskFamily",
    "batches",
    "download_omniglot",
    "generator_for",
    "make_family",
]


def make_family(name: str, split: str, **options: Any) -> TaskFamily:
    """The task family of that name.

    name: a key of FAMILIES
    split: train, validation or test
    options: arguments of the family's constructor; families of real data need `root`

    Raises: ValueError for an unknown name or a missing root, and what the constructor raises.
    """
    if name not in FAMILIES:
        raise ValueError(f"dataset: expected one of {', '.join(FAMILIES)}, got {name!r}")
    if name == "omniglot" and options.get("root") is None:
        raise ValueError("root: dataset 'omniglot' needs the folder with its archives, got none")
    return FAMILIES[name](split=split, **options)
