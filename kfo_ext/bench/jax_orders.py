"""The orders in JAX: one task's update, differentiated by jax.vjp, under vmap over tasks and jit over everything."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kfo_ext.bench.cases import Case, Form, parameter_leaves
from kfo_ext.bench.orders import Orders, Outputs, as_matrices, composed, packed_by_parameter


def _jax(device: torch.device):
    # Preallocation would take most of the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    wanted = {"cuda": "gpu"}.get(device.type, device.type)
    if jax.default_backend() != wanted:
        raise RuntimeError(f"JAX runs on {jax.default_backend()}, not on {wanted}")
    return jax


def jax_missing(device: torch.device) -> None:
    """Check that JAX can run on a device.

    Args:
        device: the operands' device.

    Raises:
        ImportError: JAX is not installed.
        RuntimeError: its default device is of another kind.
    """
    _jax(device)


def jax_vmap(case: Case) -> Orders:
    """Compute the orders on lists of JAX arrays, on JAX's default device; each call waits for its outputs.

    Args:
        case: the packed operands.

    Returns:
        A call per order.

    Raises:
        ImportError: JAX is not installed.
        RuntimeError: its default device is of another kind than the operands'.
    """
    jax = _jax(case.G.device)

    def arrays(form: Form) -> list:
        return [jax.numpy.asarray(X.cpu().numpy()) for X in form]

    leaves = as_matrices(parameter_leaves(case), case)
    phi, ddphi = ([arrays(form) for form in forms] for forms in (leaves.phi, leaves.ddphi))
    G, dY, ddG = (arrays(form) for form in (leaves.G, leaves.dY, leaves.ddG))

    def transform(R: list, G: list, L: list) -> list:
        return [R_i.T @ (G_i @ L_i) for R_i, G_i, L_i in zip(R, G, L, strict=True)]

    forward = composed(transform, case.psd, jax.numpy.tanh)

    def backward(phi, G, dY):
        return jax.vjp(forward, phi, G)[1](dY)

    def double_backward(phi, G, dY, ddphi, ddG):
        return jax.vjp(backward, phi, G, dY)[1]((ddphi, ddG))

    def order(function, *operands):
        compiled = jax.jit(jax.vmap(function))
        return lambda: jax.block_until_ready(jax.tree.leaves(compiled(*operands)))

    return {
        "forward": order(forward, phi, G),
        "backward": order(backward, phi, G, dY),
        "double_backward": order(double_backward, phi, G, dY, ddphi, ddG),
    }


def packed_from_jax(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs, as tensors on the device of the operands."""
    import numpy

    tensors = [torch.from_numpy(numpy.array(X)).to(case.G.device) for X in outputs]
    return packed_by_parameter(order, tensors, case)
