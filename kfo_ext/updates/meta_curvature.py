"""Meta-Curvature: a learned matrix for each axis of each parameter."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from kfo_ext.ops.parts import Parts
from kfo_ext.packing import listed
from kfo_ext.problems import Problems, problem_shape
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import check_packed, named_alike
from kfo_ext.updates.covered import Covered
from kfo_ext.updates.layer import KroneckerLayer, views
from kfo_ext.updates.memory import room_for_factors

_REMEDY = (
    "Give this parameter another update: ByName(parameters, {'name': MetaSGD, '*': MetaCurvature}); "
    "or adapt the head alone (ANIL)"
)


class MetaCurvature(Update):
    """U(g) multiplies a gradient along each of its axes; everything starts as the identity.

        bias, batch norm (n)             U = m g, element by element, m starts at 1
        linear (out, in)                 U = M_o g M_i
        convolution (out, in, *kernel)   U[o, i, f] = sum of M_o[o, o'] M_i[i', i] M_f[f, f'] g[o', i', f']

    The sum is over o', i' and f'; f runs over all positions of a kernel of one, two or three dimensions. In 1, 2 and 4
    dimensions this equals learn2learn's MetaCurvatureTransform; `kfo_ext.interop.learn2learn` converts its matrices.

    Args:
        parameters: the tensors to update, or (name, tensor) pairs such as `model.named_parameters()`.
        backend: see `kfo_ext.transform`.

    Raises:
        ValueError: there are no parameters, a parameter has no or more than five dimensions, devices are mixed, or the
            matrices need more than a quarter of the memory that the device has left.
        TypeError: an entry is not a tensor, or parameters are not floating point of one dtype.

    Source:
        Park and Oliva 2019, Meta-Curvature.
    """

    def __init__(self, parameters: Iterable[Tensor | tuple[str, Tensor]], *, backend: str = "auto") -> None:
        parameters = listed(parameters, "parameters", pairs=True)
        super().__init__(parameters)
        like = named_alike(parameters)[0][1].detach()
        packing = self.packing
        triples = [problem_shape(shape, name) for name, shape in zip(packing.names, packing.shapes)]
        vectors = [len(shape) == 1 for shape in packing.shapes]
        self._parts = Parts(vectors, packing.sizes)
        self._vectors = packing.part([i for i, vector in enumerate(vectors) if vector])
        n = self._vectors.numel
        self.m = nn.Parameter(torch.ones((1, n), dtype=like.dtype, device=like.device)) if n else None
        self.axes: KroneckerLayer | None = None
        self.outputs: KroneckerLayer | None = None
        rest = [i for i, vector in enumerate(vectors) if not vector]
        if not rest:
            return
        matrices = packing.part(rest)
        convolutions = [i for i, shape in enumerate(matrices.shapes) if len(shape) > 2]
        # (out) x (in) of a linear weight, and (in) x (kernel) of a convolution.
        self.axes = _layer(Problems([triples[i] for i in rest], matrices), like, backend)
        self._convolutions = Covered(matrices, convolutions)
        if convolutions:
            # (out) of a convolution: the same transform with one side.
            part = self._convolutions.packing
            rows = [(1, shape[0], shape[1:].numel()) for shape in part.shapes]
            self.outputs = _layer(Problems(rows, part, ["R"] * len(rows)), like, backend)

    @property
    def phi(self) -> Phi:
        """The m of all vectors; R and L of all matrices, as in the transform; R of all convolutions' outputs."""
        layers = [layer for layer in (self.axes, self.outputs) if layer is not None]
        rows = [] if self.m is None else [self.m]
        return (*rows, *(row for layer in layers for row in layer.phi))

    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """Compute U(g) along all axes.

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi or G has another shape.
            TypeError: there are several dtypes outside autocast.
        """
        check_packed("MetaCurvature", phi, self.phi, G, self.packing.numel)
        rows = list(phi)
        parts = self._parts.apart(G)
        done: dict[Hashable, Tensor] = {}
        if self.m is not None:
            done[True] = rows.pop(0) * parts[True]
        if self.axes is not None:
            X = self.axes.rule((rows[0], rows[1]), parts[False])
            outputs = self.outputs
            done[False] = X if outputs is None else self._convolutions.rule(lambda C: outputs.rule((rows[2],), C), X)
        return self._parts.together(done)

    def matrices(self) -> list[tuple[Tensor, ...]]:
        """The matrices of each parameter, as views: in-place changes under no_grad change the module.

        Returns:
            Per parameter (m,), (M_o, M_i) or (M_o, M_i, M_f).
        """
        vectors = iter(views(self.m, self._vectors))
        axes = iter([] if self.axes is None else self.axes.factors())
        outputs = iter([] if self.outputs is None else self.outputs.factors())
        found: list[tuple[Tensor | None, ...]] = []
        for shape in self.packing.shapes:
            if len(shape) == 1:
                found.append((next(vectors),))
                continue
            R, L = next(axes)
            found.append((_transposed(R), L) if len(shape) == 2 else (_transposed(next(outputs)[0]), R, _transposed(L)))
        # No matrix is None: every parameter has all of its matrices.
        return cast("list[tuple[Tensor, ...]]", found)


def _transposed(M: Tensor | None) -> Tensor | None:
    return None if M is None else M.mT


def _layer(problems: Problems, like: Tensor, backend: str) -> KroneckerLayer:
    with room_for_factors(problems, 1, False, like, _REMEDY):
        return KroneckerLayer(problems, psd=False, bias=False, zero=False, like=like, backend=backend)
