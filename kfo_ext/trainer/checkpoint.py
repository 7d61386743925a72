"""Checkpoints: atomic, loaded without running any code, and checked before anything is taken from them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import atomic_write

FORMAT = "kfo_ext checkpoint"
VERSION = 1
_SECTIONS = {"config": dict, "progress": dict, "learner": Mapping, "optimizer": dict, "rng": dict}


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` always holds a whole one.

    state: config, progress, learner, optimizer, rng; tensors, numbers and strings only.
    """
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to CPU memory, never executing what it contains.

    Raises: ValueError naming the file and what is wrong with it.
    """
    state = _read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of kfo_ext")
    if state.get("version") != VERSION:
        raise ValueError(f"{path}: checkpoint version {state.get('version')!r}, this kfo_ext reads {VERSION}")
    for name, kind in _SECTIONS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: the checkpoint has no valid section {name!r}")
    return state


def _read(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        # torch does not compare the checksums it wrote: a flipped bit would load as a wrong number.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path}: not a checkpoint, or a truncated one ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: the checkpoint is damaged (checksum of {damaged})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader stumbles on, the file is at fault
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a checkpoint of plain tensors and numbers ({reason[0]})") from None


def restore_learner(path: Path, learner: nn.Module, values: Mapping[str, Any]) -> None:
    """Load the parameters of a learner.

    Raises: ValueError naming the file and the first parameter that does not fit.
    """
    expected = learner.state_dict()
    missing, foreign = sorted(expected.keys() - values.keys()), sorted(values.keys() - expected.keys())
    if missing or foreign:
        kind, name = ("lacks", missing[0]) if missing else ("has a foreign", foreign[0])
        raise ValueError(f"{path}: the checkpoint {kind} parameter {name!r}")
    for name, ours in expected.items():
        if isinstance(ours, Tensor):
            _check_tensor(path, name, ours, values[name])
    try:
        learner.load_state_dict(dict(values))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def optimizer_values(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with its learning rates as numbers: on a CUDA device they are tensors there."""
    values = optimizer.state_dict()
    return {**values, "param_groups": [{**group, "lr": float(group["lr"])} for group in values["param_groups"]]}


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Load the state of an Adam, whose own loader checks the number of parameters but no shape.

    How Adam computes, and where its counters and its rate lie, stays as it is: the file may be of another device.

    Raises: ValueError naming the file and the first state that does not fit.
    """
    try:
        pairs = zip(values["param_groups"], optimizer.param_groups, strict=True)
        groups = [{**theirs, **_implementation(ours, theirs["lr"])} for theirs, ours in pairs]
        optimizer.load_state_dict({**values, "param_groups": groups})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the optimizer state does not fit ({error})") from None
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(parameter, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if state:
                _check_tensor(path, f"{name} of parameter {index}", parameter, state.get(name))


def _implementation(group: Mapping[str, Any], lr: float) -> dict[str, Any]:
    rate = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else float(lr)
    return {"lr": rate} | {name: group[name] for name in ("fused", "foreach", "capturable")}


def _check_tensor(path: Path, name: str, ours: Tensor, theirs: Any) -> None:
    if not isinstance(theirs, Tensor):
        raise ValueError(f"{path}: {name}: expected a tensor, got {type(theirs).__name__}")
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        want, got = f"{tuple(ours.shape)} {ours.dtype}", f"{tuple(theirs.shape)} {theirs.dtype}"
        raise ValueError(f"{path}: {name}: expected {want}, got {got}")
