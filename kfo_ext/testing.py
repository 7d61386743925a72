"""The table of cases that tests and benchmarks share, random operands for them, and truth in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.models import omniglot_cnn
from kfo_ext.transform import Problems, reference

# Small enough for every test; names say what each is there for.
CASES: dict[str, list[tuple[int, int, int]]] = {
    "linear": [(1, 5, 7)],
    "bias": [(1, 6, 1)],
    "conv": [(4, 3, 9)],
    "one": [(1, 1, 1)],
    "p1": [(5, 1, 9)],
    "q1": [(5, 9, 1)],
    "primes": [(7, 13, 11), (3, 2, 17), (11, 5, 3)],
    "lane_edges": [(15, 3, 4), (16, 4, 3), (17, 3, 5), (33, 2, 9)],
    "tile_edges": [(1, 31, 33), (1, 32, 32), (1, 33, 31), (2, 16, 65)],
    "mixed": [(8, 1, 9), (1, 8, 1), (1, 8, 1), (8, 8, 9), (1, 8, 1), (1, 5, 8), (1, 5, 1)],
}
# Large factors: the paper's mini-ImageNet head and softmax regression.
LARGE_CASES: dict[str, list[tuple[int, int, int]]] = {
    "head_5x1600": [(1, 5, 1600)],
    "square_784": [(1, 784, 784)],
    "conv_64": [(64, 64, 9)],
}


def model_case(layers: int) -> list[tuple[int, int, int]]:
    """The group of the paper's Omniglot CNN(layers), 32 channels, 5 ways."""
    return list(Problems.of(omniglot_cnn(layers).named_parameters()).shapes)


class Operands(NamedTuple):
    """Packed operands of a case; ddR, ddG, ddL are cotangents of transform_backward's outputs."""

    R: Tensor
    G: Tensor
    L: Tensor
    dY: Tensor
    ddR: Tensor
    ddG: Tensor
    ddL: Tensor
    bias: Tensor


def random_operands(
    shapes: Sequence[tuple[int, int, int]],
    tasks: int,
    *,
    rows: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Operands:
    """Random, non-symmetric operands.

    Args:
        shapes: (B, p, q) triples.
        tasks: rows of G and dY.
        rows: rows of R (and its cotangent) and of L, `tasks` by default; 1 is a factor shared by all tasks.
        dtype: of all operands.
        device: of all operands.
        seed: of the random numbers.
    """
    problems = Problems(shapes)
    rows_R, rows_L = rows or (tasks, tasks)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, columns: int) -> Tensor:
        return torch.randn(count, columns, generator=generator, dtype=torch.float64).to(dtype).to(device)

    R, G, L, bias = (packing.numel for packing in (problems.R, problems.packing, problems.L, problems.bias))
    return Operands(
        draw(rows_R, R), draw(tasks, G), draw(rows_L, L), draw(tasks, G),
        draw(rows_R, R), draw(tasks, G), draw(rows_L, L), draw(rows_L, bias),
    )  # fmt: skip


def truth(operands: Operands, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Every output of the three orders, in float64 by autograd of the reference."""
    flat = Problems(shapes).flat
    wide = Operands(*(operand.detach().double().requires_grad_() for operand in operands))
    R, G, L, dY = wide.R, wide.G, wide.L, wide.dY
    Y = reference.transform(R, G, L, flat)
    first = torch.autograd.grad(Y, (R, G, L), dY, create_graph=True)
    inner = sum((d * dd).sum() for d, dd in zip(first, (wide.ddR, wide.ddG, wide.ddL)))
    second = torch.autograd.grad(inner, (R, G, L, dY), allow_unused=True, materialize_grads=True)
    names = ("Y", "dR", "dG", "dL", "second_R", "second_G", "second_L", "second_dY")
    return {name: value.detach() for name, value in zip(names, (Y, *first, *second))}
