"""LinNet: a network made deeper by linear layers at its head, which add nothing to the functions it can compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class LinNet(nn.Module):
    """A copy of a network whose head is a stack of linear layers without activations: in -> widths -> out.

    For softmax regression the paper's widths are 256, 128, 64, 64; for CNN(k) the paper gives none, and the default is
    ours. The layers have a bias if the head has one. All layers are initialized anew: Xavier-uniform, biases zero.
    `MAML` adapts the whole network, `ANIL` the stack, if the model has `features`.

    Args:
        model: the network; it is not modified.
        widths: the sizes of the hidden layers, at least one; None: two, each as wide as the head's input.
        head: the name of the head, a torch.nn.Linear; None for "head", or else the last layer of a Sequential.

    Attributes:
        model: the copy, whose head is a Sequential.

    Raises:
        TypeError: the model is no module of Python, `widths` is no sequence, or the head is no torch.nn.Linear.
        ValueError: there is no width or one below 1, or no head of this name; or the head has hooks or a replaced
            forward, or shares parameters with another layer.

    Source:
        paper, sections 3 and 5.1.
    """

    def __init__(self, model: nn.Module, widths: Sequence[int] | None = None, head: str | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(f"model: expected a module of Python, got {type(model).__name__}")
        if widths is not None:
            _check_widths(widths)
        self._name = _head_of(model) if head is None else head
        _check_head(model, self._name)
        self.model = copy.deepcopy(model)
        layer = self.head
        assert isinstance(layer, nn.Linear)
        between = [layer.in_features] * 2 if widths is None else widths
        sizes = [layer.in_features, *between, layer.out_features]
        stack = nn.Sequential(*(_layer(p, q, layer) for p, q in pairwise(sizes)))
        for each in stack.children():
            nn.init.xavier_uniform_(each.get_parameter("weight"))
            if layer.bias is not None:
                nn.init.zeros_(each.get_parameter("bias"))
        _become(layer, stack.train(layer.training))

    @property
    def head(self) -> nn.Module:
        """The stack, for ANIL."""
        return self.model.get_submodule(self._name)

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        """The model's own features, for ANIL; there are none if the model has none."""
        return self.model.features  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def collapse(self) -> nn.Module:
        """Return a copy of the network whose head is one linear layer, and which computes the same function.

        Returns:
            The copy; its head is the product of the stack.

        Raises:
            ValueError: the stack has modules other than linear layers, or one with hooks or a replaced forward.
        """
        model = copy.deepcopy(self.model)
        stack = model.get_submodule(self._name)
        _become(stack, _collapsed(stack))
        return model


def _check_widths(widths: Any) -> None:
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise TypeError(f"widths: expected a sequence of integers, such as [256, 128, 64, 64], got {widths!r}")
    if not widths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in widths):
        raise ValueError(f"widths: expected at least one, each an integer of at least 1, got {widths!r}")


def _head_of(model: nn.Module) -> str:
    """The name of the default head: "head", or the last layer of a Sequential; ValueError without either."""
    if "head" in model._modules:
        return "head"
    names: list[str] = []
    layer = model
    while isinstance(layer, nn.Sequential) and len(layer):
        name, layer = list(layer.named_children())[-1]
        names.append(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"head: {type(model).__name__} neither has a submodule named head nor is a Sequential that ends with a "
            "torch.nn.Linear; pass the name of its last linear layer"
        )
    return ".".join(names)


def _check_head(model: nn.Module, name: str) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(name, str):
        raise TypeError(f"head: expected the name of a submodule, got {name!r}")
    if name not in modules:
        raise ValueError(f"head: expected the name of a submodule, got {name!r}; {type(model).__name__} has none such")
    layer = modules[name]
    if type(layer) is not nn.Linear:
        raise TypeError(f"head: expected a torch.nn.Linear, got {name!r}, which is {type(layer).__name__}")
    if _has_hooks(layer):
        raise ValueError(f"head: {name!r} has hooks, which a stack of layers would lose: remove them")
    if "forward" in vars(layer):
        raise ValueError(f"head: the forward of {name!r} was replaced, which a stack of layers would lose")
    for owner, module in modules.items():
        shared = {id(X) for X in module._parameters.values() if X is not None} & {id(X) for X in layer.parameters()}
        if module is not layer and shared:
            raise ValueError(f"head: {name!r} shares a parameter with {owner!r}, which a stack of layers would not")


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn a module into another one in place, for all references to it."""
    module.__class__ = type(other)
    module.__dict__ = other.__dict__


def _layer(inputs: int, outputs: int, like: nn.Linear) -> nn.Linear:
    """A linear layer of the dtype and device of `like`, with a bias if `like` has one."""
    own = like.weight
    return nn.Linear(inputs, outputs, like.bias is not None, device=own.device, dtype=own.dtype)


@torch.no_grad()
def _collapsed(stack: nn.Module) -> nn.Linear:
    """One layer equal to a sequence of linear layers; the products are in double precision."""
    layers = [layer for layer in stack.children() if isinstance(layer, nn.Linear)]
    if len(layers) < len(stack._modules):
        raise ValueError(f"collapse: expected only linear layers, got {stack}")
    for name, module in stack.named_modules(remove_duplicate=False):
        where = f"layer {name!r} of the head" if name else "the head"
        if _has_hooks(module):
            raise ValueError(f"collapse: {where} has hooks, which one layer would lose: remove them")
        if "forward" in vars(module) or (module in layers and type(module).forward is not nn.Linear.forward):
            raise ValueError(f"collapse: {where} has a forward of its own, which one layer would lose")
    first, *others = layers
    exact = torch.promote_types(first.weight.dtype, torch.float64)
    weight = first.weight.to(exact)
    bias: Tensor | None = None if first.bias is None else first.bias.to(exact)
    for layer in others:
        W = layer.weight.to(exact)
        terms = [] if bias is None else [W @ bias]
        terms += [] if layer.bias is None else [layer.bias.to(exact)]
        weight, bias = W @ weight, sum(terms[1:], terms[0]) if terms else None
    like = first.weight
    head = nn.Linear(weight.shape[1], len(weight), bias is not None, device=like.device, dtype=like.dtype)
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    head.requires_grad_(any(X.requires_grad for X in stack.parameters()))
    return head.train(stack.training)
