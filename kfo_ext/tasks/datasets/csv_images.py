"""A folder or zip of images with train.csv, val.csv and test.csv: the layout in which mini-ImageNet is distributed."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import torch

from kfo_ext.tasks.cache import SUFFIX, Plan, cache_folder, cached, key_of
from kfo_ext.tasks.checks import check_split
from kfo_ext.tasks.decoding import Target, check_side, decoded
from kfo_ext.tasks.images import ImageClasses
from kfo_ext.tasks.options import SIDE
from kfo_ext.tasks.sources import Source, open_source, refuse_pickles
from kfo_ext.tasks.splits import check_splits, split_files

COLUMNS = ["filename", "label"]
LAYOUT = "train.csv, val.csv and test.csv with the columns filename and label, beside a folder images"
# To be increased when the decoded pixels change.
CACHE_FORMAT = "csv_images 1"


class CsvImages(ImageClasses):
    """Few-shot tasks of the images that three csv files list, resized to side x side by Lanczos, RGB in [0, 1].

    Ravi and Larochelle's layout: train.csv, val.csv and test.csv with the columns filename and label, and a folder
    `images` beside them. The attribute `name` is the archive's name, by which results are labelled.

    Args:
        root: zip archive, or folder that has the files or one such archive.
        split: train, validation or test.
        ways: classes per task.
        shots: support images per class.
        queries: query images per class.
        side: height and width in pixels.
        seed: the run's seed.
        rotations: turn each class of each task by its own multiple of 90 degrees.
        device: the device of the split's images and of meta-batches; on the CPU the images stay in the cache file.
        cache: folder for the decoded images; default $KFO_CACHE, else kfo_ext in the user's cache home.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: files are damaged or pickled, splits share a class or an image, an option is out of range, or the
            device is not available.

    Source:
        Finn, Abbeel and Levine 2017, who resize by Lanczos; Ravi and Larochelle 2017 for the splits' files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        side: int = SIDE,
        seed: int = 0,
        rotations: bool = False,
        device: torch.device | str = "cpu",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        check_split(split)
        target = Target(check_side(side))
        with _open(Path(root)) as source:
            self.name = source.name
            path = cache_folder(cache) / (
                f"{self.name}-{split}-{side}-{key_of(CACHE_FORMAT, source.digest, split, str(side))}{SUFFIX}"
            )
            images, offsets, names = cached(path, lambda: _plan(source, split, target))
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


def _open(root: Path) -> Source:
    archives = sorted(root.glob("*.zip")) if root.is_dir() and not list(root.rglob("train.csv")) else []
    if len(archives) > 1:
        raise ValueError(f"root: {root} holds several archives, {', '.join(path.name for path in archives)}: name one")
    return open_source(archives[0] if archives else root, f"a folder or zip archive with {LAYOUT}")


def _plan(source: Source, split: str, target: Target) -> Plan:
    files = split_files(source, ".csv")
    if files is None:
        refuse_pickles(source.path, source.names, LAYOUT)
        raise FileNotFoundError(f"root: {source.path} has no train.csv; expected {LAYOUT}")
    tables = {each: _classes(source, file) for each, file in files.items()}
    check_splits({each: list(table) for each, table in tables.items()}, f"root: {source.path}")
    _check_apart(tables, source)
    classes = tables[split]
    folder = files[split].rsplit("/", 1)[0] + "/" if "/" in files[split] else ""
    paths = [f"{folder}images/{file}" for files_of in classes.values() for file in files_of]
    present = set(source.names)
    missing = [path for path in paths if path not in present]
    if missing:
        raise ValueError(
            f"root: {source.path} lacks {len(missing)} of the {len(paths)} images of {files[split]}, say {missing[0]}"
        )
    return Plan(
        tuple(classes),
        tuple(map(len, classes.values())),
        target.shape,
        lambda: decoded(source.read, paths, target, title=f"{source.name} {split}", where=str(source.path)),
    )


def _check_apart(tables: dict[str, dict[str, list[str]]], source: Source) -> None:
    """Raise ValueError for an image that two splits list."""
    seen: dict[str, str] = {}
    for split, classes in tables.items():
        for file in (file for files in classes.values() for file in files):
            if (other := seen.setdefault(file, split)) != split:
                raise ValueError(f"root: {source.path}: image {file} is in {other} and in {split}; remove one of them")


def _classes(source: Source, file: str) -> dict[str, list[str]]:
    """Class to its images, both sorted."""
    where = f"{source.path}: {file}"
    classes: dict[str, list[str]] = {}
    seen: set[str] = set()
    rows = csv.reader(io.StringIO(source.read_text(file)))
    try:
        header = next(rows, [])
        if header != COLUMNS:
            raise ValueError(f"{where}: expected the columns {','.join(COLUMNS)}, got {','.join(header)}")
        for row in filter(None, rows):
            if len(row) != len(COLUMNS) or not all(row):
                raise ValueError(f"{where}, line {rows.line_num}: expected filename,label, got {','.join(row)!r}")
            if row[0] in seen:
                raise ValueError(f"{where}, line {rows.line_num}: {row[0]} is listed twice")
            seen.add(row[0])
            classes.setdefault(row[1], []).append(row[0])
    except csv.Error as error:
        raise ValueError(f"{where}, line {rows.line_num}: {error}") from error
    return {name: sorted(classes[name]) for name in sorted(classes)}
