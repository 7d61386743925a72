"""Conversion of whole updates: one of kfo_ext to an equivalent ParameterUpdate of learn2learn, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kfo_ext.packing import listed, name_parameters
from kfo_ext.problems import problem_shape
from kfo_ext.updates import KFO, GradientDescent, MetaCurvature, MetaSGD, Update
from kfo_ext.updates.layer import views

from .factors import kronecker_factors, meta_curvature_of
from .light import light_import
from .transforms import KroneckerNetwork

Named = tuple[str, Tensor]
Module = Any


def to_learn2learn(update: Update) -> nn.Module:
    """Convert an update to an equivalent `ParameterUpdate` of learn2learn.

    `GBML(model, transform=None, compute_update=to_learn2learn(update))` runs it in learn2learn's GBML.

        GradientDescent            no transform
        KFO                        KroneckerTransform(KroneckerLinear), or of a `KroneckerNetwork` with hidden layers
        MetaCurvature              MetaCurvatureTransform
        MetaSGD                    nn.Scale

    A factor that a KFO lacks (`max_factor`) becomes an identity, and converts back to a factor.

    Args:
        update: one of the above.

    Returns:
        A `ParameterUpdate` with copies of the meta-parameters.

    Raises:
        TypeError: learn2learn has no counterpart of the update (LowRank, Chain, ByName, a subclass).
        ValueError: the update has rates per step, or MetaCurvatureTransform does not accept a parameter's shape.
        ImportError: learn2learn is not installed.
    """
    make = _MODULES.get(type(update))
    if make is None:
        raise TypeError(f"update: learn2learn has no counterpart of {type(update).__name__}, only of {_names()}")
    if update.steps is not None:
        raise ValueError("update: learn2learn has no counterpart of per_step, a rate for each inner step")
    modules = make(update)
    following = iter(modules)
    shells = [torch.empty(0)] * len(modules)
    # ParameterUpdate reads only what the transform returns.
    return cast(nn.Module, light_import().optim.ParameterUpdate(shells, lambda _: next(following)))


def from_learn2learn(learned: Module, parameters: Iterable[Tensor | Named]) -> Update:
    """Convert an update of learn2learn to an equivalent one of kfo_ext.

    Args:
        learned: a ParameterUpdate, a GBML, a LearnableOptimizer, or the algorithm MetaSGD, whose rates become those of
            our MetaSGD with lr=1.
        parameters: the model's parameters, as for `Update`.

    Returns:
        An update with copies of the meta-parameters.

    Raises:
        TypeError: `learned` is another object, a transform is none of those of `to_learn2learn`, or its dtype is not
            the parameters'.
        ValueError: there are several kinds of transforms, a fixed lr of MetaCurvatureTransform, a Scale with one number
            for a whole tensor, or transforms that were made for other parameters.
    """
    named = name_parameters(listed(parameters, "parameters", pairs=True))
    modules = _transforms(learned)
    if len(modules) != len(named):
        raise ValueError(f"parameters: expected {len(modules)}, one per transform of learned, got {len(named)}")
    read = {name: _read(name, module) for (name, _), module in zip(named, modules) if module is not None}
    kinds = {kind for kind, _ in read.values()}
    if len(kinds) > 1:
        (first, (kind, _)), *rest = read.items()
        name, other = next((name, other) for name, (other, _) in rest if other != kind)
        raise ValueError(
            f"learned: expected transforms of one kind, got {kind.described()} for {first!r} and {other.described()} "
            f"for {name!r}: convert each block of parameters, and combine them with ByName"
        )
    if not kinds:
        return GradientDescent(named)
    kind = kinds.pop()
    absent = [name for name, _ in named if name not in read]
    if absent and kind.make is not KFO:
        raise ValueError(
            f"learned: expected a transform for each parameter, got none for {absent[0]!r}: convert the others, and "
            "combine them with GradientDescent by ByName"
        )
    options = dict(kind.options) | ({"only": list(read)} if absent else {})
    update = kind.make(named, **options)
    _copy(update, [numbers for _, numbers in read.values()], list(read))
    return update


class Kind(NamedTuple):
    """The constructor of an update for transforms of one kind.

    Attributes:
        make: the update's class.
        options: names and values of its options.
    """

    make: Callable[..., Update]
    options: tuple[tuple[str, Any], ...] = ()

    def described(self) -> str:
        """The constructor's call, for messages."""
        return f"{cast(type, self.make).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options)})"


def _names() -> str:
    return ", ".join(update.__name__ for update in _MODULES)


def _kronecker_modules(update: KFO) -> list[Module]:
    """A ReshapedTransform per parameter, or None for one that follows gradient descent."""
    library = light_import()
    layer = library.nn.KroneckerLinear
    hidden = len(update.layers) - 1
    found: list[Module] = [None] * len(update.packing)
    for i in update.covered.indices:
        _, p, q = problem_shape(update.packing.shapes[i])
        if hidden:
            kind: dict[str, Any] = {"activation": update.activation, "scale": update.scale, "hidden_layers": hidden}
            inner: nn.Module = KroneckerNetwork(p, q, update.has_bias, update.psd, layer=layer, **kind)
        else:
            inner = layer(p, q, bias=update.has_bias, psd=update.psd)
        found[i] = library.optim.ReshapedTransform(transform=inner, shape=(-1, p, q)).to(update.phi[0])
    with torch.no_grad():
        for i, mine in zip(update.covered.indices, _kronecker_numbers(update)):
            for into, value in zip(_layer_numbers(found[i].transform), mine):
                into.copy_(torch.eye(len(into)) if value is None else value)
    return found


def _kronecker_numbers(update: KFO) -> list[list[Tensor | None]]:
    """Per covered parameter R, L and the bias of each layer, as views."""
    found: list[list[Tensor | None]] = [[] for _ in update.covered.indices]
    for depth, layer in enumerate(cast(Any, update.layers)):
        pairs = update.factors(depth)
        biases = views(layer.bias, update.problems.bias)
        for numbers, i, bias in zip(found, update.covered.indices, biases):
            numbers.extend([*pairs[i], *([bias] if update.has_bias else [])])
    return found


def _layer_numbers(module: Module) -> list[Tensor]:
    """R, L and the bias of each layer of a KroneckerLinear or KroneckerNetwork, as views."""
    found: list[Tensor] = []
    for layer in getattr(module, "layers", [module]):
        found.extend(kronecker_factors(layer.left, layer.right, psd=layer.psd))
        found.extend([] if layer.bias is None else [layer.bias])
    return found


def _curvature_modules(update: MetaCurvature) -> list[Module]:
    """A MetaCurvatureTransform per parameter."""
    make = light_import().optim.MetaCurvatureTransform
    found: list[Module] = []
    for name, shape in zip(update.packing.names, update.packing.shapes):
        if len(shape) not in (1, 2, 4):
            raise ValueError(
                f"update: learn2learn's MetaCurvatureTransform takes 1, 2 or 4 dimensions, got {name!r} of shape "
                f"{tuple(shape)}"
            )
        found.append(make(torch.empty(shape)).to(update.phi[0]))
    with torch.no_grad():
        for module, mine in zip(found, update.matrices()):
            for into, value in zip(meta_curvature_of(module), mine):
                into.copy_(value)
    return found


def _scale_modules(update: MetaSGD) -> list[Module]:
    """An nn.Scale per parameter."""
    scale = light_import().nn.Scale
    found = [scale(tuple(shape)).to(update.a) for shape in update.packing.shapes]
    with torch.no_grad():
        for module, value in zip(found, views(update.a, update.packing)):
            module.alpha.copy_(value)
    return found


# The updates with a counterpart in learn2learn.
_MODULES: dict[type[Update], Callable[[Any], list[Module]]] = {
    GradientDescent: lambda update: [None] * len(update.packing),
    KFO: _kronecker_modules,
    MetaCurvature: _curvature_modules,
    MetaSGD: _scale_modules,
}


def _transforms(learned: Module) -> list[Module]:
    """The transform of each parameter: a module, a tensor of rates, or None."""
    if hasattr(learned, "compute_update"):
        return _transforms(learned.compute_update)
    if hasattr(learned, "transforms_indices"):
        return [None if index is None else learned.transforms_modules[index] for index in learned.transforms_indices]
    for name in ("lrs", "transforms"):
        if isinstance(getattr(learned, name, None), (list, nn.ParameterList, nn.ModuleList)):
            return list(getattr(learned, name))
    raise TypeError(
        "learned: expected learn2learn's ParameterUpdate, GBML, LearnableOptimizer or algorithms.MetaSGD, got "
        f"{type(learned).__module__}.{type(learned).__name__}"
    )


def _read(name: str, module: Module) -> tuple[Kind, list[Tensor]]:
    """The kind of a parameter's transform, and its numbers."""
    if isinstance(module, Tensor):
        return Kind(MetaSGD), [module]
    if hasattr(module, "alpha"):
        return Kind(MetaSGD), [module.alpha]
    if hasattr(module, "mc") or hasattr(module, "mc_in"):
        if module.lr != 1:
            raise ValueError(
                f"learned: expected lr=1 in the MetaCurvatureTransform of {name!r}, got {module.lr}: MetaCurvature has "
                "no fixed factor; multiply the learner's lr by it"
            )
        return Kind(MetaCurvature), list(meta_curvature_of(module))
    inner: Module = getattr(module, "transform", module)
    layers = list(getattr(inner, "layers", [inner]))
    if not all(hasattr(layer, "left") and hasattr(layer, "right") for layer in layers):
        raise TypeError(
            f"learned: expected KroneckerLinear, KroneckerNetwork, MetaCurvatureTransform or Scale for {name!r}, got "
            f"{type(inner).__name__}"
        )
    options: dict[str, Any] = {"psd": layers[0].psd, "bias": layers[0].bias is not None}
    if len(layers) > 1:
        options |= {"hidden_layers": len(layers) - 1, "activation": inner.activation, "scale": inner.scale}
    return Kind(KFO, tuple(options.items())), _layer_numbers(inner)


@torch.no_grad()
def _copy(update: Update, found: list[list[Tensor]], names: list[str]) -> None:
    """Copy meta-parameters into an update of the same structure."""
    own = _OWN[type(update)](update)
    for name, mine, theirs in zip(names, own, found, strict=True):
        for into, value in zip(mine, theirs, strict=True):
            if into.shape != value.shape:
                raise ValueError(
                    f"learned: expected numbers of shape {tuple(into.shape)} for {name!r}, got {tuple(value.shape)}: "
                    "its transform was made for another parameter"
                )
            if into.dtype != value.dtype:
                raise TypeError(
                    f"parameters: expected {value.dtype} as the transform of {name!r} has, got {into.dtype}"
                )
    for mine, theirs in zip(own, found):
        for into, value in zip(mine, theirs):
            into.copy_(value)


# The numbers of each parameter that has a transform, as views.
_OWN: dict[type[Update], Callable[[Any], list[Any]]] = {
    KFO: _kronecker_numbers,
    MetaCurvature: lambda update: update.matrices(),
    MetaSGD: lambda update: [[row] for row in views(update.a, update.packing)],
}
