"""The orders in JAX: one task's transform, differentiated by jax.vjp, under vmap over tasks and jit over everything."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from transform_orders import Case, Orders, Outputs, packed_by_parameter


def jax_vmap(case: Case) -> Orders:
    """Lists of JAX arrays, on JAX's default device; each call returns once its outputs are there.

    Raises:
        ImportError: JAX is not installed.
        RuntimeError: its default device is of another kind than the operands'.
    """
    # It would take most of the device's memory at its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    wanted = {"cuda": "gpu"}.get(case.packed.G.device.type, case.packed.G.device.type)
    if jax.default_backend() != wanted:
        raise RuntimeError(f"JAX runs on {jax.default_backend()}, not on {wanted}")

    def array(X: Tensor):
        return jax.numpy.asarray(X.cpu().numpy())

    def matrices(operand: list[Tensor]) -> list:
        return [array(X.reshape(len(X), *shape)) for X, shape in zip(operand, case.problems.shapes, strict=True)]

    R, L, ddR, ddL = ([array(X) for X in operand] for operand in (case.R, case.L, case.ddR, case.ddL))
    G, dY, ddG = (matrices(operand) for operand in (case.G, case.dY, case.ddG))

    def forward(R, G, L):
        return [R_i.T @ (G_i @ L_i) for R_i, G_i, L_i in zip(R, G, L, strict=True)]

    def backward(R, G, L, dY):
        return jax.vjp(forward, R, G, L)[1](dY)

    def double_backward(R, G, L, dY, ddR, ddG, ddL):
        return jax.vjp(backward, R, G, L, dY)[1]((ddR, ddG, ddL))

    def order(function, *operands):
        compiled = jax.jit(jax.vmap(function))
        return lambda: jax.block_until_ready(jax.tree.leaves(compiled(*operands)))

    return {
        "forward": order(forward, R, G, L),
        "backward": order(backward, R, G, L, dY),
        "double_backward": order(double_backward, R, G, L, dY, ddR, ddG, ddL),
    }


def packed_from_jax(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs, as tensors on the device of the operands."""
    import numpy

    return packed_by_parameter(
        order, [torch.from_numpy(numpy.array(X)).to(case.packed.G.device) for X in outputs], case
    )
