"""Exports a run's network and update as plain files for other tools, and rebuilds the learner from them.

An export is a folder of three files: model.safetensors and update.safetensors hold the values under the names of the
network's and the update's own state_dict, so that either loads without the other and without kfo_ext; config.json holds
the rest, including what the update's meta-parameters were made for (the entry `_extra_state` of a state_dict).

safetensors has no checksum: config.json records the SHA-256 of both files, and of its own content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from kfo_ext.adapt import MAML
from kfo_ext.invoked import program
from kfo_ext.machine import environment
from kfo_ext.runs.files import atomic_write, is_count, read_json, write_json
from kfo_ext.runs.metrics import is_validation, read_metrics
from kfo_ext.runs.progress import Progress
from kfo_ext.runs.run_folder import RunFolder
from kfo_ext.updates import state

from .config import Config
from .run_evaluation import load_learner, restored

FORMAT = "kfo_ext export"
# The version written, and the newest that is read; every later kfo_ext reads version 1.
VERSION = 1
_CONFIG = "config.json"
# The file of each prefix of names in a learner's state_dict.
_FILES = {"model.": "model.safetensors", "update.": "update.safetensors"}
_EXTRA = "_extra_state"


def export_run(run: RunFolder, to: str | os.PathLike[str], *, name: str = "best") -> list[Path]:
    """Write the network and the update of a run as safetensors, and a config.json from which they can be rebuilt.

    config.json is written last: a folder without it is no export, or an unfinished one.

    Args:
        run: the run folder, which stays unchanged.
        to: an absent or empty folder.
        name: the checkpoint, best or last.

    Returns:
        The files.

    Raises:
        ValueError: the folder is taken, or a file of the run cannot be used; the message names it.
        OSError: a file cannot be written; the message names it, and nothing is left of the export.
    """
    folder = Path(to)
    _check_free(folder)
    config, learner, progress = load_learner(run, name)
    values = learner.state_dict()
    made_for = {key: state.decode(value, key) for key, value in values.items() if key.endswith(_EXTRA)}
    contents = {file: _serialized(values, prefix) for prefix, file in _FILES.items()}
    versions = environment()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "kfo_ext": versions["kfo_ext"],
        "torch": versions["torch"],
        "checkpoint": name,
        "iteration": progress.iteration,
        "measure": config.measure,
        "validation_score": _validation_score(run, config.measure, progress),
        "config": Config.load(run.config).to_dict(),
        "made_for": made_for,
        "files": {file: _sha256(content) for file, content in contents.items()},
    }
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / file for file in (*contents, _CONFIG)]
    try:
        for path, content in zip(written, contents.values()):
            with atomic_write(path) as file:
                file.write(content)
        write_json(folder / _CONFIG, {**about, "digest": _digest(about)})
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    return written


def from_pretrained(path: str | os.PathLike[str], **changes: Any) -> MAML:
    """Load the learner of an export, ready to evaluate, adapt or train on: `.model` and `.update` are its parts.

    The files are data, not code: nothing in them is executed. The random state of torch stays unchanged.

    Args:
        path: the folder that `kfo export` or `export_run` wrote.
        changes: options that differ from the run's, such as device or steps.

    Returns:
        The learner.

    Raises:
        ValueError: a file is missing, foreign, damaged or of a newer format, or an option cannot be changed; the
            message names the file or the option.
    """
    folder = Path(path)
    content = _read_config(folder)
    own = Config.from_dict(content["config"], str(folder / _CONFIG))
    values: dict[str, Any] = {key: state.encode(made_for) for key, made_for in content["made_for"].items()}
    for prefix, file in _FILES.items():
        tensors = _read_tensors(folder / file, content["files"].get(file))
        values |= {prefix + name: tensor for name, tensor in tensors.items()}
    # Building the learner draws an initialization from the run's seed.
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        _, learner = restored(own, folder, values, changes)
    return learner


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for the export, got a file")
    if folder.is_dir() and any(folder.iterdir()):
        what = "already holds an export" if (folder / _CONFIG).exists() else "is not empty"
        raise ValueError(f"{folder}: {what}; expected an absent or empty folder, choose another")


def _serialized(values: Mapping[str, Any], prefix: str) -> bytes:
    """Serialize the values under a prefix as safetensors, with the prefix removed from their names.

    Each value is a copy: safetensors refuses tensors that share memory, such as tied ones and views. A tied parameter
    is stored under each of its names.

    Args:
        values: a state_dict.
        prefix: of the values to write.

    Returns:
        The content of the file.
    """
    mine = {name.removeprefix(prefix): X for name, X in values.items() if name.startswith(prefix)}
    plain = {
        name: X.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, X in mine.items()
        if not name.endswith(_EXTRA)
    }
    # Model tools require this metadata before they read a file.
    return safetensors.save(plain, metadata={"format": "pt"})


def _validation_score(run: RunFolder, measure: str, progress: Progress) -> float | None:
    """The mean of the validation at the checkpoint's iteration; None if there is none, or it is not recorded."""
    if progress.iteration == progress.best_iteration > 0:
        return progress.best_score if measure == "accuracy" else -progress.best_score
    records = [record for record in read_metrics(run.metrics) if is_validation(record)]
    return next((r[f"validation_{measure}"] for r in records if r["iteration"] == progress.iteration), None)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    if not path.is_file():
        raise ValueError(f"{folder}: not an export of kfo, or an unfinished one: it has no {_CONFIG}")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        remedy = (
            f"; it is a run: write it by `{program()} export {folder} --to ...`"
            if (folder / "last.pt").exists()
            else ""
        )
        raise ValueError(f"{path}: not of an export of kfo{remedy}")
    version = content.get("version")
    if not is_count(version, 1):
        raise ValueError(f"{path}: the export is damaged (no version)")
    if version > VERSION:
        raise ValueError(
            f"{path}: export version {version}, this kfo_ext reads up to {VERSION}; it was written by a newer kfo_ext, "
            f"{content.get('kfo_ext')}: upgrade"
        )
    if content.pop("digest", None) != _digest(content):
        raise ValueError(f"{path}: the export was damaged or changed (its digest is not the recorded one)")
    parts = [content.get(key) for key in ("config", "files", "made_for")]
    made_for = parts[-1].values() if isinstance(parts[-1], dict) else ()
    if not all(isinstance(part, dict) for part in (*parts, *made_for)):
        raise ValueError(f"{path}: the export has no valid config, made_for or files")
    return content


def _read_tensors(path: Path, digest: object) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: not a readable file ({error.strerror})") from None
    if _sha256(content) != digest:
        raise ValueError(
            f"{path}: not the file that was exported with {_CONFIG} (its digest is not the recorded one): it was "
            "damaged or changed; changed values load into a module by load_state_dict"
        )
    try:
        return safetensors.load(content)
    except (KeyError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def _digest(content: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
