"""Omniglot: 1623 handwritten characters by 20 drawers each, from the official archives."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import torch

from kfo_ext.tasks.archives import Archive, fetch, read_images, sha256_of
from kfo_ext.tasks.cache import SUFFIX, Decoded, Plan, cache_folder, cached, key_of
from kfo_ext.tasks.checks import check_split
from kfo_ext.tasks.images import ImageClasses

SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
ARCHIVES = (
    Archive(
        "images_background.zip",
        9464212,
        "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
        "61bc74225a5115c1deb188b06ca40d3233fd5097d1430897d6b11d304e140c65",
    ),
    Archive(
        "images_evaluation.zip",
        6462886,
        "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
        "c1c898dcbcef1056acc0868bca916a1c716c7b151963dc8cd7fc70bcb69535fc",
    ),
)
CLASSES = {"train": 1100, "validation": 100, "test": 423}
DRAWERS = 20
SIDE = 28
# The split is part of the data set: it does not depend on a run's seed.
SPLIT_SEED = 1623
# To be increased when the decoded pixels change.
CACHE_FORMAT = "omniglot 2"


class Omniglot(ImageClasses):
    """Few-shot tasks of handwritten characters, 1x28x28, ink = 1 on 0.

    The sorted classes are shuffled by a fixed seed and split 1100 / 100 / 423.

    Args:
        root: folder with images_background.zip and images_evaluation.zip; only read.
        split: train, validation or test.
        ways: classes per task.
        shots: support images per class.
        queries: query images per class.
        seed: the run's seed.
        rotations: turn each class of each task by its own multiple of 90 degrees.
        device: the device of the split's images, at most 17 MB, and of meta-batches.
        cache: folder for the decoded images; default $KFO_CACHE, else kfo_ext in the user's cache home.
        download: fetch missing archives into `root`.

    Raises:
        FileNotFoundError: an archive is missing.
        ValueError: an archive is damaged, an option is out of range, or the device is not available.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        seed: int = 0,
        rotations: bool = True,
        device: torch.device | str = "cpu",
        cache: str | os.PathLike[str] | None = None,
        download: bool = False,
    ) -> None:
        check_split(split)
        if download:
            download_omniglot(root)
        images, _, names = _load(Path(root), cache_folder(cache))
        members = split_classes(len(names), split)
        super().__init__(
            images.view(len(names), DRAWERS, *images.shape[1:])[members].flatten(0, 1),
            torch.arange(len(members) + 1) * DRAWERS,
            split,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            rotations=rotations,
            device=device,
            names=[names[member] for member in members],
        )


def download_omniglot(root: str | os.PathLike[str], source: str = SOURCE) -> None:
    """Download the archives that are missing in a folder, about 16 MB.

    Args:
        root: the folder.
        source: URL of the folder to download from.

    Raises:
        ConnectionError: the source cannot be reached.
        ValueError: a downloaded file is not the archive.
    """
    for archive in ARCHIVES:
        target = Path(root, archive.name)
        if not target.exists():
            fetch(f"{source}/{archive.name}", target, archive)


def split_classes(classes: int, split: str) -> list[int]:
    """The indices of a split's classes in the sorted list of classes."""
    order = list(range(classes))
    random.Random(SPLIT_SEED).shuffle(order)
    first = {"train": 0, "validation": CLASSES["train"], "test": CLASSES["train"] + CLASSES["validation"]}[split]
    return order[first : first + CLASSES[split]]


def _load(root: Path, folder: Path) -> Decoded:
    missing = [archive.name for archive in ARCHIVES if not (root / archive.name).is_file()]
    if missing:
        state = "has no" if root.is_dir() else "is no folder; expected one with"
        raise FileNotFoundError(
            f"root: {root} {state} {' and '.join(missing)}, the archives of {SOURCE}; "
            "download=True fetches them (on the command line: --data-root and --download)"
        )
    key = key_of(CACHE_FORMAT, *(sha256_of(root / archive.name) for archive in ARCHIVES))
    return cached(folder / f"omniglot-{SIDE}-{key}{SUFFIX}", lambda: _plan(root))


def _plan(root: Path) -> Plan:
    """The sorted classes of both archives, "Alphabet/character01", with ink = 255."""
    pixels: dict[str, list[bytes]] = {}
    for archive in ARCHIVES:
        for path, png in read_images(root / archive.name, archive):
            pixels.setdefault("/".join(path.split("/")[1:3]), []).append(_ink(png))
    names = sorted(pixels)
    return Plan(
        tuple(names), (DRAWERS,) * len(names), (1, SIDE, SIDE), lambda: (one for name in names for one in pixels[name])
    )


def _ink(png: bytes) -> bytes:
    from PIL import Image, ImageChops

    with Image.open(io.BytesIO(png)) as image:
        return ImageChops.invert(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)).tobytes()
