"""Any tree with a folder of images per class: tieredImageNet, CUB, or a user's own photographs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from kfo_ext.tasks.cache import SUFFIX, Plan, cache_folder, cached, key_of
from kfo_ext.tasks.checks import SPLITS, check_choice, check_split
from kfo_ext.tasks.decoding import Target, check_side, decoded, is_image
from kfo_ext.tasks.images import ImageClasses
from kfo_ext.tasks.options import COLOURS, SIDE
from kfo_ext.tasks.sources import Source, open_source, refuse_pickles
from kfo_ext.tasks.splits import check_members, check_splits, read_splits, split_named

LAYOUT = "a folder of images per class, in folders train, val and test or with a splits file"
# To be increased when the decoded pixels change.
CACHE_FORMAT = "folders 1"

Tree = dict[str, list[str]]
"""A class to the paths of its images, both sorted."""


class Folders(ImageClasses):
    """Few-shot tasks of a tree with a folder of images per class, resized to side x side by Lanczos, in [0, 1].

    Args:
        root: folder or zip archive.
        split: train, validation or test.
        ways: classes per task.
        shots: support images per class.
        queries: query images per class.
        splits: the class folders of each split: a JSON file {"train": [...], "val": [...], "test": [...]}, or a folder
            with train.txt, val.txt and test.txt, one class per line. A class is named by its folder, with as much of
            the path before it as makes it unique. Default: `root` has the folders train, val (or validation) and test.
        side: height and width in pixels.
        colour: rgb or gray.
        seed: the run's seed.
        rotations: turn each class of each task by its own multiple of 90 degrees.
        device: the device of the split's images and of meta-batches; on the CPU the images stay in the cache file.
        cache: folder for the decoded images; default $KFO_CACHE, else kfo_ext in the user's cache home.

    Raises:
        FileNotFoundError: `root` or `splits` does not exist.
        ValueError: an image is damaged, splits overlap, are empty or name missing classes, an option is out of range,
            or the device is not available.
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
        side: int = SIDE,
        colour: str = "rgb",
        seed: int = 0,
        rotations: bool = False,
        device: torch.device | str = "cpu",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        check_split(split)
        target = _target(check_side(side), colour)
        listed = None if splits is None else read_splits(Path(splits))
        with open_source(Path(root), LAYOUT) as source:
            self.name = source.name
            key = key_of(CACHE_FORMAT, source.digest, split, repr(listed), repr(target))
            path = cache_folder(cache) / f"{self.name}-{split}-{side}-{key}{SUFFIX}"
            images, offsets, names = cached(path, lambda: _plan(source, split, listed, target))
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


def _target(side: int, colour: str) -> Target:
    return Target(side, 1 if check_choice("colour", colour, COLOURS) == "gray" else 3)


def _plan(source: Source, split: str, listed: dict[str, list[str]] | None, target: Target) -> Plan:
    tree = class_tree(source.names)
    if not tree:
        refuse_pickles(source.path, source.names, LAYOUT)
        raise FileNotFoundError(f"root: {source.path} has no images in folders; expected {LAYOUT}")
    splits = _of_folders(tree, source) if listed is None else _of_lists(tree, listed, source)
    classes = splits[split]
    paths = [path for images in classes.values() for path in images]
    return Plan(
        tuple(classes),
        tuple(map(len, classes.values())),
        target.shape,
        lambda: decoded(source.read, paths, target, title=f"{source.name} {split}", where=str(source.path)),
    )


def class_tree(names: Iterable[str]) -> Tree:
    """The images of every folder that holds some."""
    tree: Tree = {}
    for name in sorted(filter(is_image, names)):
        folder, slash, _ = name.rpartition("/")
        if slash:
            tree.setdefault(folder, []).append(name)
    return tree


def _of_folders(tree: Tree, source: Source) -> dict[str, Tree]:
    """Classes by the outermost folder named after a split; a class is the path behind it."""
    splits: dict[str, Tree] = {split: {} for split in SPLITS}
    outside = []
    taken: dict[tuple[str, str], str] = {}
    for folder, images in tree.items():
        parts = folder.split("/")
        depth = next((depth for depth, part in enumerate(parts) if split_named(part)), len(parts))
        name = "/".join(parts[depth + 1 :])
        split = split_named(parts[depth]) if name else None
        if split is None:
            outside.append(folder)
            continue
        # Together they may hold an image twice, as a support and as a query example.
        if (other := taken.setdefault((split, name), folder)) != folder:
            raise ValueError(
                f"root: {source.path}: class {name!r} of {split} lies in {other} and in {folder}; remove one of them, "
                "or give the splits in a file"
            )
        splits[split][name] = images
    if outside:
        raise ValueError(
            f"root: {source.path}: {outside[0]} holds images and lies in no folder train, val or test, as a "
            "class would; give the splits in a file"
        )
    check_splits({split: list(classes) for split, classes in splits.items()}, f"root: {source.path}")
    return splits


def _of_lists(tree: Tree, listed: dict[str, list[str]], source: Source) -> dict[str, Tree]:
    """The classes that the splits' lists name."""
    check_splits(listed, "splits")
    ends: dict[str, list[str]] = {}
    for folder in tree:
        parts = folder.split("/")
        for depth in range(len(parts)):
            ends.setdefault("/".join(parts[depth:]), []).append(folder)
    check_members(listed, ends, f"root: {source.path}")
    splits, taken = {}, dict.fromkeys(tree, "")
    for split, names in listed.items():
        for name in names:
            if len(ends[name]) > 1 and name not in tree:
                raise ValueError(f"splits: class {name!r} may be {' or '.join(ends[name])}: give more of the path")
            folder = name if name in tree else ends[name][0]
            if taken[folder]:
                raise ValueError(f"splits: {taken[folder]!r} and {name!r} are the same folder {folder}")
            taken[folder] = name
        splits[split] = {name: tree[name if name in tree else ends[name][0]] for name in sorted(names)}
    return splits
