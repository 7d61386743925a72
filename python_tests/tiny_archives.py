"""Small archives in the layouts of the real data sets, and what breaks them."""

from __future__ import annotations

import io
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="decoding needs Pillow")

Files = dict[str, bytes]


def pixels(seed: int, channels: int = 3, side: int = 32) -> torch.Tensor:
    """A random image, (C, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, side, side), dtype=torch.uint8, generator=generator)


def png(image: torch.Tensor, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """The file of an image (C, H, W)."""
    size = (image.shape[2], image.shape[1])
    file = io.BytesIO()
    Image.frombytes(mode, size, bytes(image.permute(1, 2, 0).flatten().tolist())).save(file, kind)
    return file.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """A zip archive in the order of the files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """The same files in a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def python2_pickle(values: Mapping[str, object]) -> bytes:
    """A dictionary as Python 2 pickles it: lists of str or int, and one array (n, m) of uint8 by numpy."""

    def text(value: str) -> bytes:
        raw = value.encode("latin-1")
        return b"U" + bytes([len(raw)]) + raw

    def value_of(value: object) -> bytes:
        if isinstance(value, list):
            items = (text(one) if isinstance(one, str) else b"J" + struct.pack("<i", one) for one in value)
            return b"](" + b"".join(items) + b"e"
        n, m = value.shape
        raw = bytes(value.flatten().tolist())
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"J" + struct.pack("<i", n) + b"J" + struct.pack("<i", m) + b"\x86"
        return array + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"

    content = b"\x80\x02}q\x01(" + b"".join(text(key) + value_of(value) for key, value in values.items()) + b"u."
    # Python's own reader of opcodes takes it.
    list(pickletools.genops(content))
    return content


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar.gz of files in one folder, as CIFAR-100 comes."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def in_directory(path: Path, name: str, offset: int, value: bytes) -> None:
    """Overwrites a field of an entry of a zip archive's directory."""
    content = bytearray(path.read_bytes())
    at = content.rindex(name.encode()) - 46 + offset
    content[at : at + len(value)] = value
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b"<html>404 Not Found</html>" * 10)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)


def added(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    """Adds a file to a zip archive."""

    def add(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content)

    return add


def huge_png() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    content = bytearray(png(pixels(0)))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)
