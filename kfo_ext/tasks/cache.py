"""A cache of decoded images: written once, memory-mapped, and used only if its checksum holds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

MAGIC = b"kfo images 1\n"
SUFFIX = ".images"
# The pixels start at a multiple of the page size of a memory map.
PAGE = 4096
CHUNK = 1 << 22


class Plan(NamedTuple):
    """Images to be decoded.

    Attributes:
        names: names of the classes.
        sizes: number of images of each class.
        shape: (C, H, W) of an image.
        pixels: decodes the images' bytes, class after class.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    pixels: Callable[[], Iterable[bytes | memoryview]]


class Decoded(NamedTuple):
    """Images of classes.

    Attributes:
        images: (n_images, C, H, W) uint8, one class after the other.
        offsets: (n_classes + 1,) int64.
        names: names of the classes.
    """

    images: Tensor
    offsets: Tensor
    names: tuple[str, ...]


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """`cache`, else $KFO_CACHE, else kfo_ext in the user's cache home."""
    if cache is not None:
        return Path(cache)
    if folder := os.environ.get("KFO_CACHE"):
        return Path(folder)
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "kfo_ext"
    try:
        return Path.home() / ".cache" / "kfo_ext"
    except RuntimeError as error:
        raise ValueError(f"KFO_CACHE: expected a folder, as this user has no home ({error}), got none") from None


def key_of(*parts: str) -> str:
    """16 hexadecimal digits that change with any part, for the name of a cache file."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cached(path: Path, plan: Callable[[], Plan]) -> Decoded:
    """Return the images of a cache file, which is written first if it is missing or damaged.

    The file appears whole or not at all, so that several processes may call this at once. Warns if the file is
    damaged, or if it cannot be written (the images are then only in memory).

    Args:
        path: the file; its name must change with everything that `plan` depends on.
        plan: returns what to decode.

    Returns:
        The images, memory-mapped.
    """
    decoded = _read(path)
    if decoded is None:
        made = plan()
        try:
            _write(path, made)
        except OSError as error:
            warnings.warn(f"cannot write the cache file {path} ({error}); next time is as slow as this", stacklevel=2)
            return _in_memory(made)
        decoded = _read(path)
        if decoded is None:
            return _in_memory(made)
    return decoded


def _read(path: Path) -> Decoded | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            magic, header = file.readline(len(MAGIC)), file.readline()
            start = _padded(len(magic) + len(header))
            values = json.loads(header)
            file.seek(start)
            # A flipped bit or a truncated file changes the checksum; the header is then ignored.
            if magic != MAGIC or _checksum(values["head"], file) != values["sha256"]:
                raise ValueError("checksum")
            whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        names, sizes, shape = values["head"]
        images = whole[start:].view(sum(sizes), *shape)
    except OSError as error:
        warnings.warn(f"cannot read the cache file {path} ({error}); building it anew", stacklevel=3)
        return None
    except (KeyError, RuntimeError, TypeError, ValueError):
        warnings.warn(f"the cache file {path} is damaged; building it anew", stacklevel=3)
        return None
    return Decoded(images, _offsets(sizes), tuple(names))


def _write(path: Path, plan: Plan) -> None:
    head = [list(plan.names), list(plan.sizes), list(plan.shape)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".write-") as folder:
        part = Path(folder, path.name)
        digest = hashlib.sha256(_plain(head))
        header = _header(head, "0" * digest.digest_size * 2)
        with part.open("wb") as file:
            file.write(header)
            for pixels in plan.pixels():
                digest.update(pixels)
                file.write(pixels)
            file.seek(0)
            file.write(_header(head, digest.hexdigest()))
        os.replace(part, path)


def _in_memory(plan: Plan) -> Decoded:
    images = torch.empty(sum(plan.sizes) * math.prod(plan.shape), dtype=torch.uint8)
    done = 0
    for pixels in plan.pixels():
        images[done : done + len(pixels)] = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        done += len(pixels)
    return Decoded(images.view(-1, *plan.shape), _offsets(plan.sizes), plan.names)


def _header(head: object, sha256: str) -> bytes:
    text = MAGIC + json.dumps({"sha256": sha256, "head": head}).encode() + b"\n"
    return text.ljust(_padded(len(text)), b"\0")


def _padded(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _plain(head: object) -> bytes:
    return json.dumps(head).encode()


def _checksum(head: object, pixels: BinaryIO) -> str:
    digest = hashlib.sha256(_plain(head))
    while chunk := pixels.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _offsets(sizes: Iterable[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)
