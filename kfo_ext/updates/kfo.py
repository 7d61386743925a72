"""META-KFO: a learned update U(g) made of Kronecker-factored layers, one pair of factors per parameter."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from kfo_ext.ops.dispatch import BACKENDS
from kfo_ext.ops.operands import HALF, KERNEL_DTYPES
from kfo_ext.packing import name_parameters
from kfo_ext.problems import Problems
from kfo_ext.updates import state
from kfo_ext.updates.activations import ACTIVATIONS, activation_name
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.layer import KroneckerLayer
from kfo_ext.updates.memory import room_for_factors


class KFO(Update):
    """A learned update of gradients; at the start U(g) = g in every setting: plain gradient descent.

    Without hidden layers U(g) = R^T g L, with psd R^T R g L^T L, plus the bias term. With `hidden_layers` = h,
    U(g) = g + K_{h+1}(act(K_h(... act(K_1(g))))), each K a Kronecker layer; the last one starts as the zero map and
    has no psd.

    It meets the contract of learn2learn's ParameterUpdate: it can be the update of GBML, and be cloned by clone_module.

    Its state_dict says what the factors were made for (`_extra_state`, a tensor of bytes), and loads nowhere else.
    Factors alone load with strict=False: then their sizes are all that is checked, and the rest is the caller's word.
    An activation is known by its qualified name; one that has none (a lambda, a partial) loads into this module and its
    copies alone.

    Args:
        parameters: the tensors to update, or (name, tensor) pairs such as `model.named_parameters()`: biases, linear
            and convolution weights (1, 2 or 4 dimensions). Their order is the order of every list in this class.
        psd: take R^T R and L^T L in place of R and L (both reference implementations do).
        bias: add a learned term per parameter to each Kronecker layer, shared by the B matrices of a convolution; None:
            with hidden layers alone, as the paper's non-linear update has it.
        hidden_layers: Kronecker layers before the last one, with an activation after each.
        activation: between layers: tanh, relu, sigmoid, gelu, softplus or any elementwise function.
        backend: see `kfo_ext.transform`.

    Raises:
        ValueError: no parameters, an unsupported shape, mixed devices, a negative depth, an unknown activation or
            backend, or factors that need more memory than the device has left (p^2 + q^2 elements per parameter and
            layer).
        TypeError: an entry that is no tensor, parameters that are not floating point of one dtype, or an option of
            another type.

    Source: paper, equations 21, 22 and 26, appendix C. The residual form, tanh and the start are this package's choice:
    the paper gives none.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor | tuple[str, Tensor]],
        *,
        psd: bool = True,
        bias: bool | None = None,
        hidden_layers: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        backend: str = "auto",
    ) -> None:
        if isinstance(parameters, Tensor):
            got = type(parameters).__name__
            raise TypeError(
                f"parameters: expected an iterable of tensors or (name, tensor) pairs, got one {got}: "
                "a KFO updates all parameters of a model at once. Where each has a transform of its own (learn2learn's "
                "LearnableOptimizer), pass kfo_ext.interop.learn2learn.gradient_transform()"
            )
        named = name_parameters(parameters)
        problems = Problems.of(named)
        super().__init__(problems.packing)
        self.problems = problems
        _check_alike(named)
        if not isinstance(psd, bool):
            raise TypeError(f"psd: expected True or False, got {psd!r}")
        if bias is not None and not isinstance(bias, bool):
            raise TypeError(f"bias: expected True, False or None, got {bias!r}")
        if isinstance(hidden_layers, bool) or not isinstance(hidden_layers, int) or hidden_layers < 0:
            raise ValueError(f"hidden_layers: expected an integer of at least 0, got {hidden_layers!r}")
        if not callable(activation) and activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected a function or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        self.psd = psd
        self.has_bias = hidden_layers > 0 if bias is None else bias
        self.activation = activation
        self._unnamed: tuple[Callable[[Tensor], Tensor], str] | None = None
        like = named[0][1].detach()
        with room_for_factors(self.problems, hidden_layers + 1, self.has_bias, like):
            self.layers = nn.ModuleList(
                KroneckerLayer(
                    self.problems,
                    psd=self.psd and (hidden_layers == 0 or i < hidden_layers),
                    bias=self.has_bias,
                    zero=hidden_layers > 0 and i == hidden_layers,
                    like=like,
                    backend=backend,
                )
                for i in range(hidden_layers + 1)
            )

    @property
    def phi(self) -> Phi:
        """All packed meta-parameters, (1, n) each: R, L (and bias) of each layer, in order."""
        return tuple(tensor for layer in self.layers for tensor in layer.phi)

    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """U(g), a pure function of packed tensors: differentiate it by either argument.

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi has another number of rows than `self.phi`.
        """
        width = 3 if self.has_bias else 2
        if len(phi) != width * len(self.layers):
            raise ValueError(f"phi: expected {width * len(self.layers)} tensors, as phi of this KFO, got {len(phi)}")
        activation = self.activation if callable(self.activation) else ACTIVATIONS[self.activation]
        hidden = G
        for i, layer in enumerate(self.layers):
            hidden = layer.rule(phi[i * width : (i + 1) * width], activation(hidden) if i else hidden)
        return hidden if len(self.layers) == 1 else G + hidden

    def factors(self, layer: int = 0) -> list[tuple[Tensor, Tensor]]:
        """One (R (p, p), L (q, q)) pair of views per parameter, read from the module as it is now.

        Args:
            layer: which Kronecker layer, 0 is the one next to the gradient.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer: expected 0 to {len(self.layers) - 1}, got {layer}")
        return self.layers[layer].factors()

    def _made_for(self) -> dict[str, Any]:
        return {
            "names": list(self.problems.packing.names),
            "shapes": [list(shape) for shape in self.problems.packing.shapes],
            "psd": self.psd,
            "bias": self.has_bias,
            "hidden_layers": len(self.layers) - 1,
            "activation": activation_name(self.activation) or self._unnamed_activation(),
        }

    def _unnamed_activation(self) -> str:
        # Kept beside the function that it stands for, so that copies of this module share it and another function not.
        if self._unnamed is None or self._unnamed[0] is not self.activation:
            self._unnamed = (self.activation, f"{state.UNNAMED}{uuid.uuid4().hex}")
        return self._unnamed[1]

    def get_extra_state(self) -> Tensor:
        """What the factors were made for, kept in the state_dict: JSON, as a tensor of bytes."""
        return state.encode(self._made_for())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: `_load_from_state_dict` has compared the state already."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args) -> None:
        # Before any factor is copied, so that a refused state leaves the module as it was.
        key = prefix + "_extra_state"
        if key in state_dict:
            state.compare(self._made_for(), state.decode(state_dict[key], key))
        for name, parameter in self.named_parameters():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"{prefix}{name}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)}: "
                    "these factors were made for other parameters"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"parameters={len(self.problems)}, psd={self.psd}, bias={self.has_bias}"


def _check_alike(named: list[tuple[str, Tensor]]) -> None:
    first_name, first = named[0]
    for name, tensor in named:
        if not tensor.is_floating_point():
            raise TypeError(f"parameter {name!r}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype not in KERNEL_DTYPES + HALF:
            raise TypeError(f"parameter {name!r}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"parameter {name!r}: expected {first.dtype} as {first_name!r} has, got {tensor.dtype}: "
                "convert the model to one dtype, or make a KFO for each"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"parameter {name!r}: expected device {first.device} as {first_name!r} has, got {tensor.device}"
            )
