"""`transform`: Y = R^T G L for every problem of every task, on the best backend that runs here."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kfo_ext.ops import library
from kfo_ext.ops.dispatch import Operator
from kfo_ext.ops.operands import check_dimensions
from kfo_ext.ops.own_code import own_code
from kfo_ext.ops.torch_private import in_functorch
from kfo_ext.ops.transform import autograd, reference
from kfo_ext.ops.transform.autograd import Family
from kfo_ext.ops.transform.checks import check
from kfo_ext.ops.transform.group import Group
from kfo_ext.ops.transform.triton import launch


def _register_triton(fragment: torch.library.Library) -> Family:
    launch.define(fragment)
    return autograd.register(fragment, "_triton")


# The compiled operators; None without the CPU library, which holds their schemas.
NATIVE = library.once("transform", autograd.register) if library.loaded("cpu") else None
# Defined in Python: it exists without the CPU library, and without triton, which the first call imports.
TRITON = library.once("triton", _register_triton)
OPERATOR = Operator(("G", "R", "L", "bias"), {"native": NATIVE, "triton": TRITON}, ("cpu", "cuda"))


@own_code
def transform(
    R: Tensor, G: Tensor, L: Tensor, problems: Group, *, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return Y = R^T G L (+ bias), differentiable to any order with respect to every operand.

    Before capturing a call in a CUDA graph, make it once with the same problems and tasks.

    Args:
        R: (tasks or 1, problems.R.numel), packed left factors.
        G: (tasks, problems.packing.numel), packed matrices.
        L: (tasks or 1, problems.L.numel), packed right factors.
        problems: the group; its `sides` define which factors are absent.
        bias: (tasks or 1, problems.bias.numel), added to each of the B matrices of a problem.
        backend: "auto" (see `kfo_ext.ops.dispatch.Operator.resolve`), "native" (compiled), "triton" (compiled at the
            first call) or "reference" (plain torch). torch.func's grad, vjp and vmap, nested in any order, keep the
            backend; in forward mode (`jvp`, `hessian`), under `functionalize`, and if torch.compile traces a torch.func
            transform, every backend runs plain torch.

    Returns:
        Y: (tasks, problems.packing.numel), of G's dtype. Half types, and all types under autocast, compute in float32.

    Raises:
        ValueError: sizes, rows or devices do not fit, or the backend is unknown.
        TypeError: operands are no dense floating-point tensors or, outside autocast, have several dtypes.
        RuntimeError: the named backend does not run here.

    Source:
        paper, appendix C.1 (W = R^T (x) L, the factorised weight of equation 21).
    """
    given = (G, R, L) if bias is None else (G, R, L, bias)
    usual = _check(problems, given)

    def compute(family: Family | None, G: Tensor, R: Tensor, L: Tensor, bias: Tensor | None = None) -> Tensor:
        one_sided = problems.one_sided
        # The compiled operator checks its operands itself, but under vmap they hold all examples.
        if family is None or one_sided is not None or in_functorch():
            check("transform", problems.columns, R, G, L, bias=bias)
        if one_sided is not None:
            out = one_sided.compute(partial(_product, family), R, G, L, adjoint=False)
            return out if bias is None else out + reference.expand_bias(bias, problems.flat)
        if family is None:
            return reference.transform(R, G, L, problems.flat, bias)
        return family.transform(R, G, L, problems.flat, bias)

    return OPERATOR.run(compute, given, backend, usual)


@own_code
def adjoint(R: Tensor, G: Tensor, L: Tensor, problems: Group, *, backend: str = "auto") -> Tensor:
    """Return R G L^T, the adjoint of `transform` as a map of its matrices.

    <transform(R, X, L), G> = <X, adjoint(R, G, L)>. No factor is transposed in memory. Errors are those of `transform`.

    Args:
        R: (tasks or 1, problems.R.numel), packed left factors.
        G: (tasks, problems.packing.numel), packed matrices.
        L: (tasks or 1, problems.L.numel), packed right factors.
        problems: as for `transform`.
        backend: as for `transform`.

    Returns:
        (tasks, problems.packing.numel), of G's dtype.
    """
    usual = _check(problems, (G, R, L))

    def compute(family: Family | None, G: Tensor, R: Tensor, L: Tensor) -> Tensor:
        if family is None or problems.one_sided is not None or in_functorch():
            check("adjoint", problems.columns, R, G, L)
        if problems.one_sided is not None:
            return problems.one_sided.compute(partial(_adjoint_product, family), R, G, L, adjoint=True)
        return _adjoint_product(family, R, G, L, problems.flat)

    return OPERATOR.run(compute, (G, R, L), backend, usual)


def _product(family: Family | None, R: Tensor, G: Tensor, L: Tensor, flat: list[int]) -> Tensor:
    return reference.transform(R, G, L, flat) if family is None else family.transform(R, G, L, flat, None)


def _adjoint_product(family: Family | None, R: Tensor, G: Tensor, L: Tensor, flat: list[int]) -> Tensor:
    if family is None:
        return reference.adjoint(R, G, L, flat)
    # The transform's derivative by its matrices, which does not read them: any tensor of that shape serves.
    return family.backward(R, G.detach(), L, G, flat, [False, True, False])[1]


def _check(problems: Group, given: tuple[Tensor, ...]) -> bool:
    """Check problems and operands; the result is that of `Operator.check`."""
    if not isinstance(problems, Group):
        raise TypeError(f"problems: expected Problems, got {type(problems).__name__}")
    usual = OPERATOR.check(given)
    for name, operand in zip(OPERATOR.operands, given):
        if operand.dim() != 2:
            check_dimensions(name, operand, ("tasks", "elements"))
    return usual
