"""Decoded data kept between processes: built once, read back only if every byte is as it was written."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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


def cached(path: Path, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The content of a cache file, built and written if the file is missing or damaged.

    path: the file; its name must change with whatever `build` depends on
    build: makes the content, of tensors and plain containers that torch.load(weights_only=True) accepts

    Warns if the file is damaged, or if it cannot be written (the content is then only in memory).
    """
    content = _read(path)
    if content is None:
        content = build()
        try:
            _write(path, content)
        except OSError as error:
            warnings.warn(f"cannot write the cache file {path} ({error}); next time is as slow as this", stacklevel=2)
    return content


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        checksum, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        warnings.warn(f"cannot read the cache file {path} ({error}); building it anew", stacklevel=3)
        return None
    if checksum != _checksum(payload):
        warnings.warn(f"the cache file {path} is damaged; building it anew", stacklevel=3)
        return None
    return torch.load(io.BytesIO(payload), weights_only=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    payload = io.BytesIO()
    torch.save(content, payload)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".write-") as folder:
        part = Path(folder, path.name)
        part.write_bytes(_checksum(payload.getbuffer()) + b"\n" + payload.getbuffer())
        os.replace(part, path)


def _checksum(payload: bytes | memoryview) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()
