"""The factors and matrices of learn2learn's transforms: read as views, and written in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def kronecker_factors(left: Tensor, right: Tensor, *, psd: bool) -> tuple[Tensor, Tensor]:
    """Convert learn2learn's (left, right) to our (R, L); gradients convert in the same way.

    Args:
        left: (p, p).
        right: (q, q).
        psd: whether the transform is left^T left X right^T right.

    Returns:
        R and L, as views.
    """
    return (left if psd else left.mT), right


def kronecker_factors_from(update: nn.Module) -> list[tuple[Tensor, Tensor] | None]:
    """Return the factors of a learn2learn `ParameterUpdate`.

    Args:
        update: a `ParameterUpdate` made with `KroneckerTransform(KroneckerLinear)`; its biases have our shape (p, q).

    Returns:
        One (R, L) pair of views per parameter, or None for a parameter without a transform.

    Raises:
        TypeError: a transform is not a Kronecker one.
    """
    layers = _kronecker_layers(update)
    return [None if layer is None else kronecker_factors(layer.left, layer.right, psd=layer.psd) for layer in layers]


@torch.no_grad()
def kronecker_factors_to(update: nn.Module, factors: Iterable[tuple[Tensor | None, Tensor | None] | None]) -> None:
    """Copy our factors into a learn2learn `ParameterUpdate`, in place.

    Args:
        update: as in `kronecker_factors_from`.
        factors: one (R, L) pair per parameter, R (p, p), L (q, q), as `KFO.factors()` returns them; None instead of a
            factor means the identity, None instead of a pair skips the parameter.

    Raises:
        TypeError: a transform is not a Kronecker one.
        ValueError: the number of pairs or a shape differs.
    """
    targets, sources = kronecker_factors_from(update), list(factors)
    if len(targets) != len(sources):
        raise ValueError(f"factors: expected {len(targets)} pairs, one per parameter of update, got {len(sources)}")
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target is None or source is None:
            continue
        for name, into, value in zip("RL", target, source, strict=True):
            if value is None:
                into.copy_(torch.eye(len(into)))
                continue
            if into.shape != value.shape:
                raise ValueError(
                    f"factors[{index}]: expected {name} of shape {tuple(into.shape)}, got {tuple(value.shape)}"
                )
            into.copy_(value)


def meta_curvature_from(update: nn.Module) -> list[tuple[Tensor, ...] | None]:
    """Return the matrices of a learn2learn `ParameterUpdate`.

    Args:
        update: a `ParameterUpdate` made with `MetaCurvatureTransform`.

    Returns:
        Per parameter (m,), (M_o, M_i) or (M_o, M_i, M_f), as views, or None for a parameter without a transform.

    Raises:
        TypeError: a transform is no `MetaCurvatureTransform`.
    """
    return [None if layer is None else meta_curvature_of(layer) for layer in _layers(update)]


@torch.no_grad()
def meta_curvature_to(update: nn.Module, matrices: Iterable[tuple[Tensor, ...] | None]) -> None:
    """Copy our matrices into a learn2learn `ParameterUpdate`, in place.

    Args:
        update: as in `meta_curvature_from`.
        matrices: per parameter (m,), (M_o, M_i) or (M_o, M_i, M_f), as `MetaCurvature.matrices()` returns them; None
            skips the parameter.

    Raises:
        TypeError: a transform is no `MetaCurvatureTransform`.
        ValueError: the number of parameters or of matrices, or a shape differs.
    """
    targets, sources = meta_curvature_from(update), list(matrices)
    if len(targets) != len(sources):
        raise ValueError(f"matrices: expected {len(targets)} tuples, one per parameter of update, got {len(sources)}")
    pairs = [
        (index, target, source)
        for index, (target, source) in enumerate(zip(targets, sources))
        if target is not None and source is not None
    ]
    for index, target, source in pairs:
        expected, got = [tuple(X.shape) for X in target], [tuple(X.shape) for X in source]
        if expected != got:
            raise ValueError(f"matrices[{index}]: expected shapes {expected}, got {got}")
    for _, target, source in pairs:
        for into, value in zip(target, source):
            into.copy_(value)


def _kronecker_layers(update: Any) -> list[Any]:
    # learn2learn wraps each layer in a ReshapedTransform.
    layers = [getattr(transform, "transform", transform) for transform in _layers(update)]
    for layer in layers:
        if layer is not None and not (hasattr(layer, "left") and hasattr(layer, "right")):
            raise TypeError(f"update: expected KroneckerLinear transforms, got {type(layer).__name__}")
    return layers


def _layers(update: Any) -> list[Any]:
    """The transform of each parameter, or None."""
    return [None if index is None else update.transforms_modules[index] for index in update.transforms_indices]


def meta_curvature_of(layer: Any) -> tuple[Tensor, ...]:
    """(m,), (M_o, M_i) or (M_o, M_i, M_f) of one MetaCurvatureTransform, as views."""
    names = {1: ("mc",), 2: ("mc_in", "mc_out"), 4: ("mc_in", "mc_out", "mc_f")}.get(getattr(layer, "dim", 0))
    if names is None or not all(hasattr(layer, name) for name in names):
        raise TypeError(f"update: expected MetaCurvatureTransform, got {type(layer).__name__}")
    return tuple(getattr(layer, name) for name in names)
