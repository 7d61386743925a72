"""CIFAR-FS: CIFAR-100's 100 classes in Bertinetto's split, from either archive that has the images."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection
from pathlib import Path

import torch

from kfo_ext.tasks.archives import sha256_of
from kfo_ext.tasks.cache import SUFFIX, Plan, cache_folder, cached, key_of
from kfo_ext.tasks.checks import check_split
from kfo_ext.tasks.datasets import bertinetto
from kfo_ext.tasks.datasets.cifar100 import SHAPE, read_cifar100
from kfo_ext.tasks.datasets.folders import Tree, class_tree
from kfo_ext.tasks.decoding import Target, decoded
from kfo_ext.tasks.images import ImageClasses
from kfo_ext.tasks.sources import Zip, refuse_pickles
from kfo_ext.tasks.splits import check_members, check_splits, lines_of, read_splits, split_files

ZIP, PYTHON = "cifar100.zip", "cifar-100-python.tar.gz"
LAYOUT = f"{ZIP} of CIFAR-FS or {PYTHON} of CIFAR-100"
# To be increased when the decoded pixels or their order change.
CACHE_FORMAT = "cifar_fs 1"

Splits = dict[str, list[str]]


class CifarFs(ImageClasses):
    """Few-shot tasks of CIFAR-FS, 3x32x32 in [0, 1]: 64 / 16 / 20 classes of 600 images.

    The images of a class are sorted by file name, so that both archives give the same tasks.

    Args:
        root: folder with cifar100.zip (CIFAR-FS) or cifar-100-python.tar.gz (CIFAR-100's own), or that file.
        split: train, validation or test.
        ways: classes per task.
        shots: support images per class.
        queries: query images per class.
        splits: folder with train.txt, val.txt and test.txt, or a JSON file; default: the zip's own, else Bertinetto's.
        seed: the run's seed.
        rotations: turn each class of each task by its own multiple of 90 degrees.
        device: the device of the split's images and of meta-batches; on the CPU the images stay in the cache file.
        cache: folder for the decoded images; default $KFO_CACHE, else kfo_ext in the user's cache home.

    Raises:
        FileNotFoundError: there is no archive.
        ValueError: the archive is damaged or of another data set, splits overlap or name missing classes, an option is
            out of range, or the device is not available.

    Source:
        Bertinetto et al. 2019, Meta-learning with differentiable closed-form solvers.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        splits: str | os.PathLike[str] | None = None,
        seed: int = 0,
        rotations: bool = False,
        device: torch.device | str = "cpu",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        check_split(split)
        archive = _archive(Path(root))
        listed = None if splits is None else read_splits(Path(splits))
        key = key_of(CACHE_FORMAT, sha256_of(archive), split, repr(listed))
        planned = _from_zip if archive.suffix == ".zip" else _from_python
        images, offsets, names = cached(
            cache_folder(cache) / f"cifar_fs-{split}-{key}{SUFFIX}", lambda: planned(archive, split, listed)
        )
        super().__init__(
            images,
            offsets,
            split,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            rotations=rotations,
            device=device,
            names=names,
        )


def _archive(root: Path) -> Path:
    found = [path for path in ([root / ZIP, root / PYTHON] if root.is_dir() else [root]) if path.is_file()]
    if not found:
        state = "has none" if root.is_dir() else "does not exist"
        raise FileNotFoundError(f"root: {root} {state}; expected {LAYOUT}")
    refuse_pickles(root, [found[0].name], LAYOUT)
    return found[0]


def _from_zip(archive: Path, split: str, listed: Splits | None) -> Plan:
    source = Zip(archive)
    tree: Tree = {}
    for folder, images in class_tree(source.names).items():
        name = folder.rsplit("/", 1)[-1]
        if name in tree:
            raise ValueError(f"{archive} holds two folders of images {name}: {folder} is the second; is it CIFAR-FS?")
        tree[name] = images
    files = split_files(source, ".txt")
    if listed is None and files is not None:
        listed = {each: lines_of(source.read_text(file)) for each, file in files.items()}
    names = _members(listed or bertinetto.CLASSES, tree, archive)[split]
    paths = [path for name in names for path in tree[name]]
    target = Target(SHAPE[-1], exact=True)
    return Plan(
        tuple(names),
        tuple(len(tree[name]) for name in names),
        SHAPE,
        lambda: decoded(source.read, paths, target, title=f"cifar_fs {split}", where=str(archive)),
    )


def _from_python(archive: Path, split: str, listed: Splits | None) -> Plan:
    classes = read_cifar100(archive)
    names = _members(listed or bertinetto.CLASSES, [name for name in classes if classes[name].names], archive)[split]
    pixels = [classes[name].pixels for name in names]
    return Plan(tuple(names), tuple(map(len, pixels)), SHAPE, lambda: itertools.chain.from_iterable(pixels))


def _members(splits: Splits, present: Collection[str], archive: Path) -> Splits:
    """The sorted classes of each split."""
    check_splits(splits, "splits")
    check_members(splits, present, str(archive))
    return {split: sorted(names) for split, names in splits.items()}
