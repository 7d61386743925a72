"""Shared by tests and benchmarks: the table of cases, random operands, float64 truth, and the comparison with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfo_ext.networks import omniglot_cnn
from kfo_ext.ops.transform import reference
from kfo_ext.ops.transform.autograd import Family
from kfo_ext.ops.transform.op import NATIVE, OPERATOR, TRITON, transform
from kfo_ext.problems import Problems

# Small enough for every test; each name says what the case covers.
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
# Large factors: the paper's mini-ImageNet head and softmax regression, a product in unequal blocks, and sums over few
# terms for a large result.
LARGE_CASES: dict[str, list[tuple[int, int, int]]] = {
    "head_5x1600": [(1, 5, 1600)],
    "square_784": [(1, 784, 784)],
    "blocks_197x300": [(1, 197, 300)],
    "conv_64": [(64, 64, 9)],
    "short_sums": [(1, 40, 17), (2, 20, 40), (3, 40, 9), (17, 32, 32)],
}

# The orders, and the names of their outputs in `truth`.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "forward": ("Y",),
    "backward": ("dR", "dG", "dL"),
    "double_backward": ("second_R", "second_G", "second_L", "second_dY"),
}
# Error allowed, relative to the largest element of the true output; sums grow with p, q and B.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}


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
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Operands:
    """Draw random, non-symmetric operands.

    Args:
        shapes: (B, p, q) triples.
        tasks: rows of G and dY.
        rows: rows of R (and its cotangent) and of L, `tasks` by default; 1 is a factor shared by all tasks.
        dtype: dtype of all operands.
        device: device of all operands.
        seed: seed of the random numbers.

    Returns:
        The operands, packed.
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


def by_autograd(operands: Operands, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Every output of the three orders, by autograd of Y = compute(R, G, L), in the dtype of the operands."""
    R, G, L, dY, *cotangents, _ = (operand.detach().requires_grad_() for operand in operands)
    Y = compute(R, G, L)
    first = torch.autograd.grad(Y, (R, G, L), dY, create_graph=True)
    second = torch.autograd.grad(first, (R, G, L, dY), cotangents, allow_unused=True, materialize_grads=True)
    names = [name for names in OUTPUTS.values() for name in names]
    return {name: value.detach() for name, value in zip(names, (Y, *first, *second))}


def truth(operands: Operands, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Every output of the three orders, in float64 by autograd of the reference."""
    flat = Problems(shapes).flat
    wide = Operands(*(operand.double() for operand in operands))
    return by_autograd(wide, lambda R, G, L: reference.transform(R, G, L, flat))


def run_backend(backend: str, operands: Operands, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Compute every output of the three orders, by autograd of the public transform.

    Args:
        backend: the name of the backend.
        operands: packed operands.
        shapes: (B, p, q) triples.

    Returns:
        The outputs by the names of `OUTPUTS`.

    Raises:
        RuntimeError: the backend does not run on the operands' device.
    """
    problems = Problems(shapes)
    return by_autograd(operands, lambda R, G, L: transform(R, G, L, problems, backend=backend))


def family_of(backend: str, device: torch.device | str) -> Family:
    """Return the three operators of a compiled backend.

    Args:
        backend: "native" or "triton".
        device: the device to run on.

    Returns:
        The operators.

    Raises:
        ValueError: the backend is neither.
        RuntimeError: the backend does not run on `device`; the message gives the reason.
    """
    if backend not in ("native", "triton"):
        raise ValueError(f"backend: expected native or triton, got {backend!r}")
    family = {"native": NATIVE, "triton": TRITON}[OPERATOR.resolve(backend, torch.device(device))]
    assert family is not None, "what resolves is registered"
    return family


def run_order(
    family: Family, order: str, operands: Operands, flat: list[int], need: Sequence[bool] = (True,) * 4
) -> tuple[Tensor, ...]:
    """The outputs of one order, named in OUTPUTS; `need` is ignored by forward, and cut to three for backward."""
    R, G, L, dY, ddR, ddG, ddL, _ = operands
    if order == "forward":
        return (family.transform(R, G, L, flat),)
    if order == "backward":
        return family.backward(R, G, L, dY, flat, need[:3])
    return family.double_backward(R, G, L, dY, ddR, ddG, ddL, flat, need)


def run_all(family: Family, operands: Operands, flat: list[int]) -> dict[str, Tensor]:
    """Every output of the three orders, under the names of `truth`."""
    return {
        name: output
        for order, names in OUTPUTS.items()
        for name, output in zip(names, run_order(family, order, operands, flat))
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of `expected`.

    Args:
        actual: any shape and floating-point dtype.
        expected: float64, of the same shape.

    Returns:
        The relative error; NaN if either tensor holds a NaN.
    """
    if not expected.numel():
        return 0.0
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Compare an output with float64 truth, within TOLERANCE.

    Args:
        actual: the output, which must be contiguous.
        expected: float64, of the same shape.
        name: the start of messages.

    Raises:
        AssertionError: shape, strides or values differ.
    """
    assert actual.shape == expected.shape, name
    assert actual.is_contiguous(), name
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[actual.dtype], f"{name}: relative error {error:.2e}"


STRIDES = ("transposed", "sliced", "stepped", "expanded", "scalar")


def with_strides(X: Tensor, kind: str) -> Tensor:
    """Copy values to a tensor of other strides.

    Args:
        X: (rows, columns).
        kind: one of STRIDES.

    Returns:
        The values of X, or for `expanded` and `scalar` those of its first row and element.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "transposed":
        return X.T.contiguous().T
    if kind == "sliced":
        return torch.cat([X, X + 1], 1).repeat_interleave(2, 0)[::2, : X.shape[1]]
    if kind == "stepped":
        return torch.stack([X, X + 1], -1)[..., 0]
    if kind == "expanded":
        return X[:1].expand(X.shape)
    if kind == "scalar":
        return X[:1, :1].expand(X.shape)
    raise ValueError(f"kind: expected one of {', '.join(STRIDES)}, got {kind!r}")


class EagerRecorder:
    """Emulates a CUDA graph on the CPU: a replay computes again, into the same memory.

    Args:
        module: the module whose gradients a replay writes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def warm_up(self, iterate: Callable[[], Any], times: int) -> None:
        """Run `iterate`; the last run shows which outputs and gradients exist."""
        for _ in range(times):
            report = iterate()
        self.report = type(report)(*(None if X is None else torch.full_like(X, float("nan")) for X in report))
        self.gradients = [
            None if p.grad is None else torch.full_like(p, float("nan")) for p in self.module.parameters()
        ]

    def record(self, iterate: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The replay and the tensors that it writes; like a capture it computes nothing yet."""

        def give(gradients: list[Tensor | None]) -> None:
            for p, gradient in zip(self.module.parameters(), gradients, strict=True):
                p.grad = gradient

        def replay() -> None:
            before = [p.grad for p in self.module.parameters()]
            for into, X in zip(self.report, iterate(), strict=True):
                if X is not None:
                    into.copy_(X)
            for into, p in zip(self.gradients, self.module.parameters(), strict=True):
                if into is not None and p.grad is not None:
                    into.copy_(p.grad)
            # A replay moves memory, not Python's names for it.
            give(before)

        give(self.gradients)
        return replay, self.report
