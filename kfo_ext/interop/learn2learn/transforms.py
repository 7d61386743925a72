"""learn2learn's transforms on our kernels: from a parameter's gradient to its update."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfo_ext.functional import adjoint, transform
from kfo_ext.problems import Problems
from kfo_ext.updates import KFO, MetaCurvature, Update
from kfo_ext.updates.activations import ACTIVATIONS

Named = tuple[str, Tensor]


class GradientTransform(nn.Module):
    """An update of one parameter, as learn2learn calls it for each parameter.

    Args:
        update: an update of one parameter.

    Raises:
        TypeError: `update` is no Update.
        ValueError: it was made for several parameters.
    """

    def __init__(self, update: Update) -> None:
        super().__init__()
        if not isinstance(update, Update):
            raise TypeError(f"update: expected an Update of one parameter, got {type(update).__name__}")
        if len(update.packing) != 1:
            raise ValueError(f"update: expected one of one parameter, got one of {len(update.packing)}")
        self.update = update

    def forward(self, gradient: Tensor) -> Tensor:
        """Return the update, of the gradient's shape."""
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradient: expected a tensor, got {type(gradient).__name__}")
        return cast(Tensor, self.update.transform([gradient])[0])


class Transform:
    """Makes the update of one parameter (when called, as in learn2learn), or one update of all of them.

    Args:
        make: an update's class, or a partial of it.
    """

    def __init__(self, make: Callable[[list[Any]], Update]) -> None:
        if not callable(make):
            raise TypeError(f"update: expected the class of an update, such as KFO, got {type(make).__name__}")
        self._make = make

    def __call__(self, parameter: Tensor) -> GradientTransform:
        """The `GradientTransform` of a parameter."""
        return GradientTransform(self._make([parameter]))

    def together(self, parameters: Iterable[Tensor | Named]) -> Update:
        """One update of all parameters, which our `ParameterUpdate` uses instead of one per parameter."""
        return self._make(list(parameters))


def gradient_transform(update: Callable[..., Update] = KFO, /, **options: Any) -> Transform:
    """Make a transform of learn2learn from the class of an update.

    `LearnableOptimizer(model, gradient_transform())`, `GBML(model, gradient_transform(KFO, hidden_layers=2))`.

    Args:
        update: KFO, MetaSGD, MetaCurvature or another update's class.
        **options: options of the update.

    Returns:
        An argument `transform` of learn2learn's classes.
    """
    return Transform(partial(update, **options))


class KroneckerTransform(Transform):
    """learn2learn's KroneckerTransform: KFO without hidden layers.

    Args:
        kronecker_cls: KroneckerLinear, ours or learn2learn's.
        bias: learn a (p, q) term per parameter.
        psd: use R^T R and L^T L instead of R and L.

    Raises:
        TypeError: another class. learn2learn's own KroneckerTransform accepts any, and our GBML accepts that.
    """

    def __init__(self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True) -> None:
        if kronecker_cls is not KroneckerLinear and kronecker_cls is not _theirs("nn", "KroneckerLinear"):
            raise TypeError(
                f"kronecker_cls: expected KroneckerLinear, got {getattr(kronecker_cls, '__name__', kronecker_cls)}: "
                "learn2learn's KroneckerTransform takes other classes; gradient_transform(KFO, hidden_layers=2) is the "
                "non-linear update"
            )
        super().__init__(partial(KFO, bias=bias, psd=psd))


class KroneckerLinear(nn.Module):
    """learn2learn's KroneckerLinear: left X right (+ bias), or with psd left^T left X right^T right (+ bias).

    It starts as the identity. Its state dict has learn2learn's keys.

    Args:
        n: the size of left.
        m: the size of right.
        bias: learn an (n, m) term, which starts at 0.
        psd: use left^T left and right^T right.
        device: the device of the parameters.
    """

    def __init__(
        self, n: int, m: int, bias: bool = True, psd: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd
        self.problems = Problems([(1, n, m)])

    def forward(self, x: Tensor) -> Tensor:
        """Map matrices.

        Args:
            x: (..., n, m), or the columns of a matrix one after the other, (n * m,).

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: x has another shape.
        """
        _, n, m = self.problems.shapes[0]
        if x.dim() == 1 and len(x) == n * m:
            return self(x.view(m, n).mT).mT.reshape(-1)
        if x.dim() < 2 or x.shape[-2:] != (n, m):
            raise ValueError(f"x: expected shape (..., {n}, {m}) or ({n * m},), got {tuple(x.shape)}")
        G, L = x.reshape(-1, n * m), self.right.reshape(1, -1)
        bias = None if self.bias is None else self.bias.reshape(1, -1)
        R = (self.left if self.psd else self.left.mT).reshape(1, -1)
        if self.psd:
            G = adjoint(R, G, L, self.problems)
        return transform(R, G, L, self.problems, bias=bias).view(x.shape)


class KroneckerNetwork(nn.Module):
    """KFO's non-linear update as a `kronecker_cls` of learn2learn's KroneckerTransform.

    X + K_{h+1}(act(K_h(... act(K_1(s X))))) / s, each K a KroneckerLinear; the last one starts as the zero map and has
    no psd.

    Args:
        n: the size of left.
        m: the size of right.
        bias: whether every layer has a bias; KFO has one by default.
        psd: whether the hidden layers use left^T left and right^T right.
        hidden_layers: number of hidden layers, at least 1.
        activation: as for KFO.
        scale: s.
        layer: KroneckerLinear, ours or learn2learn's.

    Raises:
        ValueError: there is no hidden layer; and as KFO.
    """

    def __init__(
        self,
        n: int,
        m: int,
        bias: bool = True,
        psd: bool = True,
        *,
        hidden_layers: int = 1,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        scale: float = 1.0,
        layer: Callable[..., nn.Module] = KroneckerLinear,
    ) -> None:
        super().__init__()
        # KFO checks the options.
        options: dict[str, Any] = {"hidden_layers": hidden_layers, "activation": activation, "scale": scale}
        KFO([torch.empty(1)], bias=bias, psd=psd, **options)
        if hidden_layers < 1:
            raise ValueError(f"hidden_layers: expected at least 1, got {hidden_layers}: use KroneckerLinear")
        self.activation, self.scale = activation, float(scale)
        depths = range(hidden_layers + 1)
        self.layers = nn.ModuleList(layer(n, m, bias=bias, psd=psd and i < hidden_layers) for i in depths)
        nn.init.zeros_(cast(Tensor, self.layers[-1].left))

    def forward(self, X: Tensor) -> Tensor:
        """The map of matrices (..., n, m)."""
        activation = self.activation if callable(self.activation) else ACTIVATIONS[self.activation]
        hidden = self.scale * X
        for i, layer in enumerate(self.layers):
            hidden = layer(activation(hidden) if i else hidden)
        return X + hidden / self.scale


class MetaCurvatureTransform(GradientTransform):
    """learn2learn's MetaCurvatureTransform: a matrix for each axis of a parameter.

    Args:
        param: the parameter.
        lr: a fixed factor of the update.
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__(MetaCurvature([param]))
        self.lr = lr

    def forward(self, gradient: Tensor) -> Tensor:
        """Return the update, of the gradient's shape."""
        return self.lr * super().forward(gradient)

    @classmethod
    def together(cls, parameters: Iterable[Tensor | Named]) -> Update:
        """One MetaCurvature of all parameters."""
        return MetaCurvature(parameters)


def ours(made: Any) -> Any:
    """Our transform for learn2learn's own if it is KFO or MetaCurvature; any other unchanged."""
    if made is _theirs("optim", "MetaCurvatureTransform"):
        return MetaCurvatureTransform
    if type(made) is _theirs("optim", "KroneckerTransform") and made.kronecker_cls is _theirs("nn", "KroneckerLinear"):
        return KroneckerTransform(KroneckerLinear, bias=made.bias, psd=made.psd)
    return made


def _theirs(module: str, name: str) -> Any:
    """learn2learn's class, or a value that equals nothing else if it is not imported."""
    return getattr(sys.modules.get(f"learn2learn.{module}"), name, _theirs)
