"""What meta-parameters were made for: JSON in a tensor of bytes, since every value of a state_dict is a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

VERSION = 1
# Prefix of the identity of an activation that has no name.
UNNAMED = "without a name, "


def encode(made_for: dict[str, Any]) -> Tensor:
    """The JSON text of `made_for` and the format's version, as a tensor of bytes: (n,), uint8."""
    text = json.dumps({"version": VERSION, **made_for})
    # An explicit device: a default set by a context could be meta, which holds no bytes.
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def decode(state: object, key: str) -> dict[str, Any]:
    """Read the dict that `encode` was given.

    Args:
        state: a tensor of bytes; another dtype or device is accepted, since tools may convert a whole state_dict.
        key: of the state in its state_dict, for messages.

    Returns:
        The dict, with the format's version.

    Raises:
        ValueError: the state is anything else, or of another version.
    """
    made_for, got = _read(state)
    if isinstance(made_for, dict) and made_for.get("version") != VERSION:
        got = f"version {made_for.get('version')!r}"
    if got is not None:
        raise ValueError(
            f"{key}: expected what the meta-parameters were made for, JSON bytes of version {VERSION}, got {got}: "
            "it was saved by another version of kfo_ext, or changed since"
        )
    names, shapes = made_for.get("names"), made_for.get("shapes")
    well_formed = {
        "names": _list_of(str, names),
        "shapes": isinstance(shapes, list) and all(_list_of(int, shape) for shape in shapes),
    }
    for field, right in well_formed.items():
        if not right:
            raise ValueError(f"{key}: {f'damaged {field}' if field in made_for else f'lacks {field}'}")
    if len(names) != len(shapes):
        raise ValueError(f"{key}: {len(names)} names, but {len(shapes)} shapes")
    return made_for


def _list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _read(state: object) -> tuple[Any, str | None]:
    """The content of the JSON, and None or a description of what there is instead of an object."""
    if isinstance(state, dict):
        return None, f"a dict with {', '.join(map(str, state)) or 'no keys'}"
    if not isinstance(state, Tensor):
        return None, f"a value of type {type(state).__name__}"
    values = state.double().cpu() if state.dim() == 1 and not state.is_meta and not state.is_complex() else None
    if values is None or not bool(((values >= 0) & (values <= 255) & (values == values.round())).all()):
        return None, f"a tensor of {tuple(state.shape)} {state.dtype} on {state.device} that holds no bytes"
    try:
        made_for = json.loads(bytes(values.to(torch.uint8).tolist()))
    except ValueError:
        return None, f"a tensor of {len(state)} bytes that are no JSON"
    return made_for, None if isinstance(made_for, dict) else f"a {type(made_for).__name__}"


def compare(mine: dict[str, Any], theirs: dict[str, Any], key: str) -> None:
    """Check that meta-parameters made for `theirs` fit an update made for `mine`.

    Args:
        mine: what the update was made for.
        theirs: what the state was made for, as `decode` returns it.
        key: of the state in its state_dict, for messages.

    Raises:
        ValueError: names, shapes or options differ.
    """
    if len(theirs["names"]) != len(mine["names"]):
        raise ValueError(
            f"state_dict: expected meta-parameters of {len(mine['names'])} parameters, got {len(theirs['names'])}"
        )
    positions = [str(i) for i in range(len(mine["names"]))]
    both_named = positions not in (mine["names"], theirs["names"])
    for name, shape, other_name, other_shape in zip(mine["names"], mine["shapes"], theirs["names"], theirs["shapes"]):
        if shape != other_shape or (both_named and name != other_name):
            raise ValueError(
                f"state_dict: expected meta-parameters for parameter {name!r} of shape {tuple(shape)}, "
                f"got some made for {other_name!r} of shape {tuple(other_shape)}"
            )
    for option, value in mine.items():
        if option not in theirs:
            raise ValueError(f"{key}: lacks {option}")
        other = theirs[option]
        if option in ("names", "shapes") or other == value:
            continue
        if isinstance(value, list) and isinstance(other, list) and len(value) == len(other) == len(mine["names"]):
            # One entry for each parameter: the first that differs is enough.
            name, value, other = next(entry for entry in zip(mine["names"], value, other) if entry[1] != entry[2])
            option = f"{option} of parameter {name!r}"
        raise ValueError(
            f"state_dict: expected meta-parameters with {option}={value!r}, got {option}={other!r}"
            + _unnamed_remedy(value, other)
        )


@contextmanager
def explained() -> Iterator[None]:
    """Extend torch's error if a state_dict has meta-parameters without the state that says what they were made for.

    Yields:
        Nothing; the block loads the state_dict.

    Raises:
        RuntimeError: torch's error in the block, explained if a state is missing.
    """
    try:
        yield
    except RuntimeError as error:
        # No hook of torch reveals whether loading is strict.
        missing = next((line for line in str(error).splitlines() if "Missing key" in line), "")
        if '_extra_state"' not in missing:
            raise
        raise RuntimeError(
            f"{error}\n\t_extra_state says what an update's meta-parameters were made for; without it their sizes are "
            "all that is checked: load them by strict=False if you know that they belong here"
        ) from None


def _unnamed_remedy(*values: object) -> str:
    if not any(isinstance(value, str) and value.startswith(UNNAMED) for value in values):
        return ""
    return (
        "; a function without a name is that of one update and its copies alone: use a def of a module, "
        "or load the rest without _extra_state by strict=False if you know that they belong here"
    )
