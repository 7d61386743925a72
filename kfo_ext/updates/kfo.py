"""KFO: a learned update U(g) made of Kronecker-factored layers, one pair of factors per parameter."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfo_ext.ops.dispatch import BACKENDS
from kfo_ext.packing import Packing, listed
from kfo_ext.problems import Problems, problem_shape
from kfo_ext.updates import state
from kfo_ext.updates.activations import ACTIVATIONS, activation_name
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import check_number, named_alike
from kfo_ext.updates.covered import Covered, matching
from kfo_ext.updates.layer import KroneckerLayer, Pair
from kfo_ext.updates.memory import room_for_factors
from kfo_ext.updates.rates import StepRates


class KFO(Update):
    """A learned update of gradients; at the start U(g) = g in every setting: plain gradient descent.

    Without hidden layers U(g) = R^T g L, with psd R^T R g L^T L, plus the bias term. With `hidden_layers` = h,
    U(g) = g + K_{h+1}(act(K_h(... act(K_1(s g))))) / s, each K a Kronecker layer; the last one starts as the zero map
    and has no psd. The number s > 0 is `scale`.

    It meets the contract of learn2learn's ParameterUpdate: it can be the update of GBML, and be cloned by clone_module.

    Its state loads only if names, shapes, options and the factors of each parameter are the same (see `Update`). An
    activation is identified by its qualified name; one without a name (a lambda, a partial) loads only into this module
    and its copies.

    Args:
        parameters: the tensors to update, or (name, tensor) pairs such as `model.named_parameters()`. Biases, linear
            and convolution weights (1 to 5 dimensions) get factors. A parameter of three dimensions that is no
            convolution, such as (1, tokens, width), follows the same rule: its first dimension shares the factors of
            the other two; `only` leaves it out. Their order is the order of every list in this class.
        only: names of the parameters that get factors, or patterns such as "head.*" (fnmatch); the rest follows
            gradient descent, U(g) = g. None: all.
        max_factor: the longest side that gets a factor; on a longer one U is the identity, and nothing of its size is
            stored. A parameter with both sides longer follows gradient descent, without a bias term. None: any size.
        psd: use R^T R and L^T L instead of R and L (both reference implementations do).
        bias: add a learned term per parameter to each Kronecker layer, shared by the B matrices of a convolution; None:
            only with hidden layers, as in the paper's non-linear update.
        hidden_layers: Kronecker layers before the last one, with an activation after each.
        activation: between layers: tanh, relu, sigmoid, gelu, softplus or any elementwise function.
        scale: s, a fixed number: gradients are multiplied by it before the hidden layers, whose output is divided by
            it. It decides whether they are non-linear at all: tanh(x) is nearly x at the size that gradients have. If
            the activation is the identity, s cancels except for biases; with relu too, since relu(s x) = s relu(x).
        per_step: the number of inner steps that have their own learned rate for each parameter tensor, with or without
            factors, in front of U; each is 1 at the start. None for none.
        backend: see `kfo_ext.transform`.

    Raises:
        ValueError: there are no parameters; a shape, an activation or a backend is not supported; devices are mixed;
            the depth is negative; `scale` is not above 0, does not fit the parameters' dtype, or has no effect because
            there are no hidden layers; `per_step` is less than 1; a pattern matches no parameter; `max_factor` leaves
            no factor; or the factors need more than a quarter of the memory that the device has left (p^2 + q^2
            elements per parameter and layer).
        TypeError: an entry is not a tensor, parameters are not floating point of one dtype, or an option has another
            type.

    Source:
        paper, equations 21, 22 and 26, appendix C. The residual form, tanh and the start are this package's choice: the
        paper gives none.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor | tuple[str, Tensor]],
        *,
        only: Iterable[str] | None = None,
        max_factor: int | None = None,
        psd: bool = True,
        bias: bool | None = None,
        hidden_layers: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        scale: float = 1.0,
        per_step: int | None = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(parameters, Tensor):
            got = type(parameters).__name__
            raise TypeError(
                f"parameters: expected an iterable of tensors or (name, tensor) pairs, got one {got}: "
                "a KFO updates all parameters of a model at once. Where each has a transform of its own (learn2learn's "
                "LearnableOptimizer), pass kfo_ext.interop.learn2learn.gradient_transform()"
            )
        parameters = listed(parameters, "parameters", pairs=True)
        super().__init__(parameters)
        like = named_alike(parameters)[0][1].detach()
        self.covered, self.problems = _covered_problems(self.packing, only, max_factor)
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
        self.scale = _checked_scale(scale, hidden_layers, like.dtype)
        self.psd = psd
        self.has_bias = hidden_layers > 0 if bias is None else bias
        self.activation = activation
        self._unnamed: tuple[str | Callable[[Tensor], Tensor], str] | None = None
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
        self.rates = None if per_step is None else StepRates(self.packing, per_step, like)
        self.steps = per_step

    @property
    def phi(self) -> Phi:
        """All packed meta-parameters, (1, n) each: R, L (and bias) of each layer, in order; then the steps' rates."""
        layers = tuple(tensor for layer in self._layers for tensor in layer.phi)
        return layers if self.rates is None else (*layers, self.rates.row)

    def rule(self, phi: Phi, G: Tensor, step: int | None = None) -> Tensor:
        """Compute U(g) as a pure function of packed tensors, differentiable by both arguments.

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.
            step: the inner step, with `per_step`.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi has another number of rows than `self.phi`, or the step has no rates.
        """
        problems = self.problems
        # The number of rows of each layer: R, L and the bias, as far as it has them.
        rows = (problems.R.numel > 0) + (problems.L.numel > 0) + self.has_bias
        layers = rows * len(self.layers)
        check_number("KFO", phi, layers + (self.rates is not None))
        U = self.covered.rule(partial(self._covered_rule, phi[:layers]), G)
        return U if self.rates is None else self.rates.rule(phi[layers], U, step)

    def _covered_rule(self, phi: Phi, G: Tensor) -> Tensor:
        """`rule` of the covered parameters' columns."""
        activation = self.activation if callable(self.activation) else ACTIVATIONS[self.activation]
        layers = self._layers
        width = len(phi) // len(layers)
        hidden = G if self.scale == 1 else self.scale * G
        for i, layer in enumerate(layers):
            hidden = layer.rule(phi[i * width : (i + 1) * width], activation(hidden) if i else hidden)
        if len(layers) == 1:
            return hidden
        return G + (hidden if self.scale == 1 else hidden / self.scale)

    @property
    def _layers(self) -> list[KroneckerLayer]:
        return cast("list[KroneckerLayer]", list(self.layers))

    def factors(self, layer: int = 0) -> list[Pair]:
        """The factors of one Kronecker layer, as views of the module's present meta-parameters.

        None stands for a factor that a parameter does not have, and counts as the identity: a side longer than
        `max_factor`, or both sides of a parameter that follows gradient descent.

        Args:
            layer: which Kronecker layer, 0 is the one next to the gradient.

        Returns:
            One (R (p, p), L (q, q)) pair per parameter.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer: expected 0 to {len(self.layers) - 1}, got {layer}")
        pairs: list[Pair] = [(None, None)] * len(self.packing)
        for i, pair in zip(self.covered.indices, self._layers[layer].factors()):
            pairs[i] = pair
        return pairs

    def options(self) -> dict[str, Any]:
        """The options of the factors, and the sides that have a factor, per parameter."""
        factors = [""] * len(self.packing)
        for i, side in zip(self.covered.indices, self.problems.sides):
            factors[i] = side
        return {
            "factors": factors,
            "psd": self.psd,
            "bias": self.has_bias,
            "hidden_layers": len(self.layers) - 1,
            "activation": activation_name(self.activation) or self._unnamed_activation(),
            "scale": self.scale,
            "per_step": self.steps,
        }

    def _unnamed_activation(self) -> str:
        # Stored with the function, so that copies of this module share the identity, and another function does not.
        known = self._unnamed
        if known is None or known[0] is not self.activation:
            known = self._unnamed = (self.activation, f"{state.UNNAMED}{uuid.uuid4().hex}")
        return known[1]

    def extra_repr(self) -> str:
        """The number of parameters that have factors, and the options."""
        count = len(self.packing)
        covered = count if self.covered.all else f"{len(self.covered.indices)} of {count}"
        return f"parameters={covered}, psd={self.psd}, bias={self.has_bias}"


def _checked_scale(scale: float, hidden_layers: int, dtype: torch.dtype) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale: expected a number, got {scale!r}")
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    # A number outside this range would turn all gradients into zeros or infinities.
    if not least <= scale <= most:
        raise ValueError(
            f"scale: expected a finite number above 0, in {dtype} from {least:.3g} to {most:.3g}, got {scale}"
        )
    if scale != 1 and hidden_layers == 0:
        raise ValueError(
            f"scale: expected 1 without hidden layers, where it would have no effect, got {scale}: set hidden_layers"
        )
    return float(scale)


def _covered_problems(packing: Packing, only: Iterable[str] | None, max_factor: int | None) -> tuple[Covered, Problems]:
    """The parameters that get a factor, and their problems; raises TypeError or ValueError for bad options."""
    if max_factor is not None and (isinstance(max_factor, bool) or not isinstance(max_factor, int)):
        raise TypeError(f"max_factor: expected an integer or None, got {max_factor!r}")
    if max_factor is not None and max_factor < 1:
        raise ValueError(f"max_factor: expected at least 1, got {max_factor}")
    wanted = range(len(packing)) if only is None else matching(packing.names, only, "only")
    indices, shapes, sides = [], [], []
    for i in wanted:
        B, p, q = problem_shape(packing.shapes[i], packing.names[i])
        side = "".join(letter for letter, size in (("R", p), ("L", q)) if max_factor is None or size <= max_factor)
        if side:
            indices.append(i)
            shapes.append((B, p, q))
            sides.append(side)
    if not indices:
        raise ValueError(
            f"max_factor: expected one that leaves a factor, got {max_factor}: both sides of every parameter are "
            "longer; use GradientDescent"
        )
    covered = Covered(packing, indices)
    return covered, Problems(shapes, covered.packing, sides)
