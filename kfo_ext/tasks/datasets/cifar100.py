"""CIFAR-100's own archive, cifar-100-python.tar.gz: classes, names and pixels, read without running its pickles."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from kfo_ext.tasks.datasets.inert_pickle import Bytes, array_of, read_pickle
from kfo_ext.tasks.sources import MOST_BYTES

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MEMBERS = ("meta", "train", "test")


class Labelled(NamedTuple):
    """The images of one class: the name of each, and where its pixels are."""

    names: list[str]
    pixels: list[memoryview]


def read_cifar100(path: Path) -> dict[str, Labelled]:
    """Read the images of both parts of the archive.

    Args:
        path: the archive.

    Returns:
        The images of each class, in the order of the images' names.

    Raises:
        ValueError: a member, which is named, is damaged, missing, or of another data set.
    """
    members = _members(path)
    classes = _texts(_table(members["meta"], f"{path}: meta"), "fine_label_names", f"{path}: meta")
    found: dict[str, list[tuple[str, memoryview]]] = {name: [] for name in classes}
    for member in ("train", "test"):
        where = f"{path}: {member}"
        table = _table(members[member], where)
        names, labels = _texts(table, "filenames", where), table.get("fine_labels")
        images: Bytes = array_of(table.get("data"), f"{where}: data")
        if images.shape != (len(names), PIXELS) or not isinstance(labels, list) or len(labels) != len(names):
            raise ValueError(
                f"{where}: expected {PIXELS} bytes and a fine label for each of the {len(names)} files, got "
                f"{images.shape} bytes"
            )
        content = memoryview(images.content)
        for at, (name, label) in enumerate(zip(names, labels)):
            if not isinstance(label, int) or not 0 <= label < len(classes):
                raise ValueError(f"{where}: expected fine labels from 0 to {len(classes) - 1}, that of {name} is not")
            found[classes[label]].append((name, content[at * PIXELS : (at + 1) * PIXELS]))
    # In the order of their names, as in the archive of single images, so that both give the same tasks.
    pairs = {name: sorted(images, key=lambda image: image[0]) for name, images in found.items()}
    return {name: Labelled([one for one, _ in images], [one for _, one in images]) for name, images in pairs.items()}


def _members(path: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    left = MOST_BYTES
    try:
        with tarfile.open(path, "r:gz") as file:
            for member in file:
                left -= member.size
                if left < 0:
                    raise ValueError(f"{member.name} holds {member.size} bytes, more than any CIFAR-100")
                name = member.name.rsplit("/", 1)[-1]
                stream = file.extractfile(member) if name in MEMBERS and member.isfile() else None
                if stream is not None:
                    contents[name] = stream.read()
    except (EOFError, OSError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no tar archive ({error}); download it again") from error
    missing = [name for name in MEMBERS if name not in contents]
    if missing:
        raise ValueError(f"{path}: expected the files {', '.join(MEMBERS)}, found no {', '.join(missing)}")
    return contents


def _table(content: bytes, where: str) -> dict[Any, Any]:
    """The dictionary of a member; its keys are str, or bytes if Python 3 wrote it."""
    table = read_pickle(content, where)
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a dictionary, got {type(table).__name__}")
    return {_text(key): value for key, value in table.items()}


def _texts(table: dict[Any, Any], key: str, where: str) -> list[str]:
    values = table.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(_text(value), str) for value in values):
        raise ValueError(f"{where}: expected names as {key!r}, found {sorted(map(str, table))}; is it CIFAR-100?")
    return [_text(value) for value in values]


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value
