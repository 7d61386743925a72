"""The files of a data set in a folder or a zip archive, read in place without unpacking."""

from __future__ import annotations

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kfo_ext.tasks.archives import UNREADABLE, sha256_of
from kfo_ext.tasks.cache import SUFFIX as CACHED

# No photograph, list of files or list of classes is larger; a larger file could fill the memory.
MOST_BYTES = 1 << 28
# The depth of nested folders; a deeper path is a cyclic link.
MOST_DEPTH = 12
PICKLES = (".pkl", ".pickle", ".pck", ".p")


class Source(ABC):
    """Files by their path, with slashes and relative to `path`.

    Attributes:
        path: the folder or the archive.
        names: the names of all files, sorted, without hidden ones and those of __MACOSX.
        digest: a hash that changes if a file changes.
    """

    path: Path
    names: list[str]
    digest: str

    @property
    def name(self) -> str:
        """The archive's or the folder's own name, by which results are labelled."""
        path = self.path.resolve()
        return path.stem if path.is_file() else path.name

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the archive; afterwards nothing can be read."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read one file.

        Args:
            name: one of `names`.

        Returns:
            The file's content.

        Raises:
            ValueError: the file, which is named, cannot be read or is larger than any image.
        """

    def read_text(self, name: str) -> str:
        """The content of a text file in UTF-8."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {name} is no text in UTF-8 ({error})") from None


class Folder(Source):
    """The files below a folder. Its digest hashes their names, sizes and times, not their contents."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without the cache's own files, which may be here too.
        found = sorted(one for one in _walk(path, "", 0) if _is_visible(one[0]) and not one[0].endswith(CACHED))
        self.names = [name for name, _ in found]
        self.digest = hashlib.sha256(repr(found).encode()).hexdigest()

    def read(self, name: str) -> bytes:
        """The content of one file; raises ValueError if it cannot be read."""
        path = self.path / name
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size <= MOST_BYTES else b""
        except OSError as error:
            raise ValueError(f"{self.path}: {name} cannot be read ({error})") from error
        _check_size(self.path, name, size)
        return content

    def close(self) -> None:
        """Do nothing."""


class Zip(Source):
    """The files of a zip archive. Its digest is the archive's sha256.

    Args:
        path: the archive.

    Raises:
        ValueError: the archive is truncated or no zip file, or holds a path that leads out of it, two files of one
            path, or a file larger than any image.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.digest = path, sha256_of(path)
        try:
            self._file = zipfile.ZipFile(path)
        except UNREADABLE as error:
            raise ValueError(
                f"{path} is no whole zip archive ({error}): got {path.stat().st_size} bytes with sha256 {self.digest}; "
                "download it again"
            ) from error
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._file.infolist():
            if entry.is_dir() or not _is_visible(entry.filename):
                continue
            _check_path(path, entry.orig_filename)
            _check_size(path, entry.filename, entry.file_size)
            if entry.filename in self._entries:
                raise ValueError(f"{path} holds {entry.filename} twice: expected each file once")
            self._entries[entry.filename] = entry
        self.names = sorted(self._entries)

    def close(self) -> None:
        """Close the archive; afterwards nothing can be read."""
        self._file.close()

    def read(self, name: str) -> bytes:
        """The content of one file; raises ValueError if it cannot be read."""
        try:
            return self._file.read(self._entries[name])
        except UNREADABLE as error:
            raise ValueError(
                f"{self.path} is damaged or packed in a way that Python does not read ({name}: {error}); "
                "download it again"
            ) from error


def open_source(path: Path, expected: str = "a folder or a zip archive") -> Source:
    """Open a folder or a zip archive.

    Args:
        path: the folder or the archive.
        expected: a description of the expected layout, for messages.

    Returns:
        Its files.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is a pickled cache, or an archive that `Zip` refuses.
    """
    if not path.exists():
        raise FileNotFoundError(f"root: {path} does not exist; expected {expected}")
    refuse_pickles(path, [path.name], expected)
    return Folder(path) if path.is_dir() else Zip(path)


def refuse_pickles(path: Path, names: list[str], expected: str) -> None:
    """Raise ValueError if there is a pickled cache among the names."""
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"root: {path} holds the pickled cache {pickles[0]}, and unpickling a file runs whatever code it holds; "
            f"expected {expected}"
        )


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, tuple[int, int]]]:
    if depth > MOST_DEPTH:
        raise ValueError(f"root: {folder} lies more than {MOST_DEPTH} folders deep: does a link lead back to it?")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", depth + 1)
            elif entry.is_file():
                status = entry.stat()
                yield prefix + entry.name, (status.st_size, status.st_mtime_ns)


def _is_visible(name: str) -> bool:
    parts = name.split("/")
    return not any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


def _check_path(archive: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name.split("/")[0] or "\0" in name:
        raise ValueError(f"{archive} holds the path {name!r}, which leads out of it or means another file elsewhere")


def _check_size(archive: Path, name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{archive}: expected files of at most {MOST_BYTES} bytes, got {name} of {size}")
