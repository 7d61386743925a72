"""T-Nets: a learned linear map T after every linear map of a network; T is only meta-learned."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# The layers that get a T; all others stay unchanged.
LINEAR_MAPS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class TNet(nn.Module):
    """A copy of a network that computes T(Wx + b) instead of every Wx + b.

    T is linear over the output channels (1x1, for a convolution). It follows the bias and precedes normalisation, is
    on the output layer too, and starts as the identity. Since T(Wx + b) = (TW)x + Tb, each layer keeps W, b and T as
    parameters and computes its `weight` T W and `bias` T b; losses are differentiated through T. The inner loop adapts
    only W and b. T is only meta-learned, as are the layers that have no T, such as normalisations, embeddings,
    recurrent layers and the input projections of torch.nn.MultiheadAttention:

        MAML(TNet(model), lr=0.1, steps=5)                      # adapts tnet.adapted by default

    Modules that occur twice have one T; modules that share a weight have a T each. A grouped convolution computes as
    one without groups, since T mixes the groups.

    Args:
        model: the network, initialised; it is not modified.

    Attributes:
        model: the copy, with T.

    Raises:
        TypeError: the model is no module of Python.
        ValueError: the model has no linear layer or convolution of torch.nn, or one that is lazy, computes its weight
            from other tensors (parametrised, pruned), has a replaced forward, or has a T already.

    Source:
        Lee and Choi 2018; paper, equation 25.
    """

    # See kfo_ext.networks.protocol.
    head_alone = "has a T after every layer for the inner loop to adapt through; use MAML(model, adapted=model.adapted)"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(f"model: expected a module of Python, got {type(model).__name__}")
        for name, layer in model.named_modules():
            if reason := _refusal(layer):
                raise ValueError(f"model: {type(layer).__name__}{f' {name!r}' if name else ''} {reason}")
        self.model = copy.deepcopy(model)
        layers = [layer for layer in self.model.modules() if isinstance(layer, LINEAR_MAPS)]
        if not layers:
            kinds = ", ".join(kind.__name__ for kind in LINEAR_MAPS)
            raise ValueError(
                f"model: expected a network with at least one linear map of torch.nn ({kinds}), "
                f"got {type(model).__name__} without any"
            )
        for layer in layers:
            _put(layer)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of every W and b, tied ones with all their names: what the inner loop adapts."""
        own = {id(X) for layer in self.modules() if isinstance(layer, Transformed) for X in (layer.W, layer.b)}
        return tuple(name for name, X in self.named_parameters(remove_duplicate=False) if id(X) in own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def absorb(self) -> nn.Module:
        """Return a copy of the network without T that computes the same function.

        Returns:
            The copy, with weights T W and biases T b. Its convolutions have one group, and weights that were shared
            under several T are separate.
        """
        model = copy.deepcopy(self.model)
        for layer in model.modules():
            if isinstance(layer, Transformed):
                _absorb(layer)
        return model


class Transformed(nn.Module):
    """A linear map of torch.nn with T: its forward reads the weight T W and the bias T b.

    Attributes:
        W: the map's weight without T.
        b: the map's bias without T, or None.
        T: (out, out), over output channels.
        split: the number of groups of W.
        groups: a convolution's number of groups with T, 1.
        kind: the class without T.
    """

    W: nn.Parameter
    b: nn.Parameter | None
    T: nn.Parameter
    split: int
    groups: int
    kind: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        """The weight T W, without groups. It is computed at every access: change W instead."""
        groups, out = self.split, len(self.T)
        T = self.T.unflatten(1, (groups, out // groups))
        if getattr(self, "transposed", False):
            # W (in, out / groups, ...): the first axis holds the groups' inputs.
            W = self.W.flatten(2).unflatten(0, (groups, len(self.W) // groups))
            return torch.einsum("pgo,giok->gipk", T, W).reshape(len(self.W), out, *self.W.shape[2:])
        W = self.W.flatten(1).unflatten(0, (groups, out // groups))
        inputs = self.W.shape[1] * groups
        return torch.einsum("pgo,goi->pgi", T, W).reshape(out, inputs, *self.W.shape[2:])

    @property
    def bias(self) -> Tensor | None:
        """The bias T b."""
        return None if self.b is None else torch.mv(self.T, self.b)

    def reset_parameters(self) -> None:
        """Raises RuntimeError: torch's method would change T W, a temporary."""
        raise RuntimeError(f"{type(self).__name__}: initialise the network before TNet, or W, b and T by themselves")

    def __reduce__(self) -> Any:
        # The class is created here, so pickle cannot import it by name.
        return _new, (self.kind,), self.__dict__


# By the class without T.
_CLASSES: dict[type[nn.Module], type[Transformed]] = {}


def _with_t(kind: type[nn.Module]) -> type[Transformed]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"T{kind.__name__}", (Transformed, kind), {"kind": kind, "__module__": kind.__module__})
    return _CLASSES[kind]


def _new(kind: type[nn.Module]) -> Transformed:
    made = _with_t(kind)
    return made.__new__(made)


def _refusal(layer: nn.Module) -> str:
    """The reason why a layer cannot get a T, or ""."""
    if isinstance(layer, Transformed):
        return "has a T already"
    base = next((base for base in LINEAR_MAPS if isinstance(layer, base)), None)
    if base is None:
        return ""
    if layer._parameters.get("weight") is None or "bias" not in layer._parameters:
        return "computes its weight or bias from other tensors: T needs a plain one; remove the parametrisation"
    if any(X is not None and is_lazy(X) for X in layer._parameters.values()):
        return "is lazy: give it a first input before T"
    for name in ("forward", "_conv_forward"):
        if name in vars(layer) or getattr(type(layer), name, None) is not getattr(base, name, None):
            return f"has a forward of its own, which T cannot enter: build it from torch.nn.{base.__name__} and others"
    return ""


def _put(layer: nn.Module) -> None:
    """Add T to a layer in place, so that every reference to it stays valid."""
    weight, bias = layer._parameters.pop("weight"), layer._parameters.pop("bias")
    assert weight is not None
    layer.__class__ = _with_t(type(layer))
    assert isinstance(layer, Transformed)
    layer.split = getattr(layer, "groups", 1)
    out = weight.shape[1] * layer.split if getattr(layer, "transposed", False) else len(weight)
    if hasattr(layer, "groups"):
        layer.groups = 1
    layer.register_parameter("W", weight)
    layer.register_parameter("b", bias)
    layer.register_parameter("T", nn.Parameter(torch.eye(out, dtype=weight.dtype, device=weight.device)))


def _absorb(layer: Transformed) -> None:
    """Undo `_put`, with T multiplied into the weight and the bias."""
    with torch.no_grad():
        values = {"weight": (layer.weight, layer.W), "bias": (layer.bias, layer.b)}
    for name in ("W", "b", "T"):
        delattr(layer, name)
    del layer.split
    layer.__class__ = layer.kind  # type: ignore[assignment]
    for name, (value, own) in values.items():
        parameter = None if value is None or own is None else nn.Parameter(value, requires_grad=own.requires_grad)
        layer.register_parameter(name, parameter)
