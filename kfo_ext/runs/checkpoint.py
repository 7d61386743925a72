"""Checkpoints: written atomically, loaded without executing code, and checked before any content is used.

A file is one line of text and a payload:

    kfo_ext checkpoint VERSION DIGEST LENGTH
    payload

VERSION is that of the format, DIGEST the payload's SHA-256 in hexadecimal, LENGTH its size in bytes. The payload is
what `torch.save` writes for a dictionary of the sections config, progress, learner, optimizer and rng. The reader
rebuilds the line from the payload and compares: no flipped bit passes. The digest detects damage; it is no signature.
Version 2 is that of kfo_ext 0.1.0. Every later kfo_ext reads it; python_tests/fixtures/run-0.1.0 is a run of it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import atomic_write

# The version written. The digest of a later version must cover its number too: one flipped bit turns a 3 into a 2.
VERSION = 2
# The oldest version read.
OLDEST = 2
_MAGIC = b"kfo_ext checkpoint "
# Longer than any first line: no more of a foreign file is read.
_LINE = 256
_SECTIONS = {"config": dict, "progress": dict, "learner": Mapping, "optimizer": dict, "rng": dict}


def save(path: Path, state: Mapping[str, Any]) -> str:
    """Write a checkpoint such that `path` always holds a complete one.

    Args:
        path: the file to write or replace.
        state: config, progress, learner, optimizer, rng; tensors, numbers and strings only.

    Returns:
        The digest of the file.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getbuffer()
    with atomic_write(path) as file:
        file.write(_first_line(payload, VERSION))
        file.write(payload)
    return _sha256(payload)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to CPU memory, never executing its content.

    Args:
        path: the file to read.

    Returns:
        The dictionary that `save` was given.

    Raises:
        ValueError: the file is missing, damaged, foreign or of a newer format than this kfo_ext's; the message names
            it.
    """
    payload = _payload(path)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever error the reader raises, the file is at fault
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a checkpoint of plain tensors and numbers ({reason[0]})") from None
    for name, kind in _SECTIONS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: the checkpoint has no valid section {name!r}")
    return state


def digest(path: Path) -> str:
    """Compute the digest of a checkpoint, which distinguishes it from any other.

    Args:
        path: the file to read.

    Returns:
        The SHA-256 of its payload, in hexadecimal.

    Raises:
        ValueError: the file is missing, damaged or foreign; the message names it.
    """
    return _sha256(_payload(path))


def _payload(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            line = file.readline(_LINE)
            payload = file.read() if line.startswith(_MAGIC) else b""
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error.strerror})") from None
    if not line.startswith(_MAGIC):
        raise ValueError(f"{path}: not a checkpoint of kfo_ext")
    text, _, length = (line[len(_MAGIC) :].split() + [b""] * 3)[:3]
    version = next((number for number in range(OLDEST, VERSION + 1) if text == b"%d" % number), None)
    if version is None:
        raise ValueError(f"{path}: {_unread(text.decode(errors='replace'))}")
    if line == _first_line(payload, version):
        return payload
    if length != b"%d" % len(payload):
        raise ValueError(f"{path}: the checkpoint is truncated or damaged (its length is not the recorded one)")
    raise ValueError(f"{path}: the checkpoint is damaged (its digest is not the recorded one)")


def _unread(version: str) -> str:
    """The reason why a file of this format version is not read."""
    read = f"{VERSION}" if OLDEST == VERSION else f"{OLDEST} to {VERSION}"
    reason = f"checkpoint version {version!r}, this kfo_ext reads {read}"
    if version.isdecimal() and int(version) > VERSION:
        return f"{reason}; it was written by a newer kfo_ext: upgrade"
    return reason


def _first_line(payload: bytes | memoryview, version: int) -> bytes:
    return b"%s%d %s %d\n" % (_MAGIC, version, _sha256(payload).encode(), len(payload))


def _sha256(payload: bytes | memoryview) -> str:
    return hashlib.sha256(payload).hexdigest()


def restore_learner(path: Path, learner: nn.Module, values: Mapping[str, Any]) -> None:
    """Load the parameters of a learner.

    Args:
        path: the checkpoint, for messages.
        learner: takes the values.
        values: its state_dict.

    Raises:
        ValueError: a parameter does not fit; the message names the file and the first such parameter.
    """
    expected = learner.state_dict()
    missing, foreign = (
        sorted(keys, key=str) for keys in (expected.keys() - values.keys(), values.keys() - expected.keys())
    )
    if missing or foreign:
        kind, name = ("lacks", missing[0]) if missing else ("has a foreign", foreign[0])
        raise ValueError(f"{path}: the checkpoint {kind} parameter {name!r}")
    for name, ours in expected.items():
        # A module compares its extra state itself.
        if isinstance(ours, Tensor) and not name.endswith("_extra_state"):
            _check_tensor(path, name, ours, values[name])
    try:
        learner.load_state_dict(dict(values))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def optimizer_values(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with its learning rates as numbers; on a CUDA device they are tensors."""
    values = optimizer.state_dict()
    return {**values, "param_groups": [{**group, "lr": float(group["lr"])} for group in values["param_groups"]]}


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Load the state of an optimizer; its own loader checks the number of parameters but no shape.

    Implementation options, and the device of counters and rates, stay as they are: the file may come from another
    device.

    Args:
        path: the checkpoint, for messages.
        optimizer: takes the values.
        values: as `optimizer_values` returns them.

    Raises:
        ValueError: a state does not fit; the message names the file and the first such state.
    """
    try:
        pairs = zip(values["param_groups"], optimizer.param_groups, strict=True)
        groups = [{**theirs, **_implementation(ours, theirs["lr"])} for theirs, ours in pairs]
        optimizer.load_state_dict({**values, "param_groups": groups})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the optimizer state does not fit ({error})") from None
    owned = ((group, parameter) for group in optimizer.param_groups for parameter in group["params"])
    for index, (group, parameter) in enumerate(owned):
        state = optimizer.state.get(parameter, {})
        if not state:
            continue
        for name in _state_names(group):
            ours = torch.zeros(()) if name == "step" else parameter
            _check_tensor(path, f"{name} of parameter {index}", ours, state.get(name))


def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that an optimizer stores per parameter of a group, which its options determine."""
    if "betas" in group:
        return ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_buffer",) if group.get("momentum") else ()


def _implementation(group: Mapping[str, Any], lr: float) -> dict[str, Any]:
    rate = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else float(lr)
    return {"lr": rate} | {name: group[name] for name in ("fused", "foreach", "capturable") if name in group}


def _check_tensor(path: Path, name: str, ours: Tensor, theirs: Any) -> None:
    if not isinstance(theirs, Tensor):
        raise ValueError(f"{path}: {name}: expected a tensor, got {type(theirs).__name__}")
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        want, got = f"{tuple(ours.shape)} {ours.dtype}", f"{tuple(theirs.shape)} {theirs.dtype}"
        raise ValueError(f"{path}: {name}: expected {want}, got {got}")
