"""Zip archives of images in which a data set is distributed: checking, reading and fetching them."""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CHUNK = 1 << 20
# The errors of zipfile for a damaged file: RuntimeError if an entry is encrypted or of an unknown method
# (NotImplementedError), OSError also from bzip2.
UNREADABLE = (
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class Archive(NamedTuple):
    """The identity of one archive.

    Attributes:
        name: file name.
        size: bytes of the official file.
        sha256: sha256 of the official file.
        listing: sha256 over name, size and CRC-32 of its images; it does not depend on how they are packed.
    """

    name: str
    size: int
    sha256: str
    listing: str


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def listing_of(entries: Sequence[zipfile.ZipInfo]) -> str:
    """The hexadecimal sha256 over name, size and CRC-32 of zip entries."""
    lines = (f"{entry.filename} {entry.file_size} {entry.CRC:08x}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def image_entries(file: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The PNG entries of a zip file in the order of their names."""
    entries = (entry for entry in file.infolist() if entry.filename.endswith(".png"))
    return sorted(entries, key=lambda entry: entry.filename)


def read_images(path: Path, archive: Archive) -> Iterator[tuple[str, bytes]]:
    """Yield the images of an archive.

    Args:
        path: the zip file.
        archive: the identity it must have.

    Yields:
        Name and bytes of each image, in the order of the names.

    Raises:
        ValueError: the file is truncated, damaged, packed in a way that Python does not read, or another archive.
    """
    digest = sha256_of(path)
    try:
        with zipfile.ZipFile(path) as file:
            entries = image_entries(file)
            if digest != archive.sha256 and listing_of(entries) != archive.listing:
                raise ValueError("it holds other images")
            for entry in entries:
                yield entry.filename, _content(file, entry)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged or another archive ({error}): expected {archive.size} bytes with sha256 "
            f"{archive.sha256}, or the same images packed anew, got {path.stat().st_size} bytes with sha256 {digest}"
        ) from error


def _content(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return file.read(entry)
    except UNREADABLE as error:
        raise zipfile.BadZipFile(f"{entry.filename}, packed by method {entry.compress_type}: {error}") from error


def fetch(url: str, target: Path, archive: Archive) -> None:
    """Download one archive; the target appears whole and checked, or not at all.

    Args:
        url: the source.
        target: the file to write.
        archive: the identity it must have.

    Raises:
        ConnectionError: the server cannot be reached.
        ValueError: the downloaded file is not the archive.
    """
    advice = f"download it where there is a network and put it at {target}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        part = Path(folder, archive.name)
        try:
            _copy_url(url, part, archive.size)
        except OSError as error:
            raise ConnectionError(f"cannot download {url} ({error}); {advice}") from error
        size, digest = part.stat().st_size, sha256_of(part)
        if digest != archive.sha256:
            raise ValueError(
                f"{url}: expected {archive.size} bytes with sha256 {archive.sha256}, "
                f"got {size} bytes with sha256 {digest}; {advice}"
            )
        os.replace(part, target)


def _copy_url(url: str, path: Path, size: int) -> None:
    from tqdm import tqdm

    # disable=None: silent unless standard error is a terminal
    bar = tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None)
    with bar, urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as file:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
