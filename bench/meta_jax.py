"""The meta-iteration as plain JAX functions under jit: value and gradients of the mean query loss over tasks."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from bench.meta_case import Gradients, MetaCase


class Jax:
    """All tasks by `jax.vmap`, or one after the other by `jax.lax.map`.

    Args:
        case: the operands.
        tasks: "vmap" or "map".
        patches: compute convolutions as a product of matrices with the 3x3 patches of the images, which XLA for CPUs
            runs several times as fast as the convolutions themselves.

    Raises:
        ImportError: JAX is not installed.
        RuntimeError: its default device is of another kind than the case's.
        ValueError: there is no such `tasks`.
    """

    def __init__(self, case: MetaCase, *, tasks: str, patches: bool = False) -> None:
        # Preallocation would take most of the device's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if tasks not in ("vmap", "map"):
            raise ValueError(f"tasks: expected vmap or map, got {tasks!r}")
        if case.network.form != "cnn":
            raise ValueError(f"network: the program is that of a CNN, not of a {case.network.form}")
        # Process-wide: arrays keep their dtype, float32 as well as float64.
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        kind = case.batch.support.x.device.type
        if jax.default_backend() != {"cuda": "gpu"}.get(kind, kind):
            raise RuntimeError(f"JAX runs on {jax.default_backend()}, not on {kind}")
        self.jax, self.dtype = jax, case.batch.support.x.dtype

        def array(X: Tensor):
            return jax.numpy.asarray(X.detach().cpu().numpy())

        support, query = case.batch
        self.operands = (
            [array(parameter) for parameter in case.model.parameters()],
            [(array(R), array(L)) for R, L in case.factors or []],
            (array(support.x), array(support.y), array(query.x), array(query.y)),
        )
        function = jax.value_and_grad(
            _meta_loss(jax, case, tasks, patches), argnums=(0, 1) if case.factors is not None else (0,)
        )
        self.program = jax.jit(function).lower(*self.operands).compile()
        self.result = None

    def run(self) -> float:
        """Compute the loss and the meta-gradients, and wait for them."""
        self.result = self.jax.block_until_ready(self.program(*self.operands))
        return float(self.result[0])

    def gradients(self) -> Gradients:
        """The meta-gradients of the last run, as tensors.

        Returns:
            As for every contender.

        Raises:
            AssertionError: they have another dtype than the case.
        """
        import numpy

        tensors = [torch.from_numpy(numpy.array(X)) for X in self.jax.tree.leaves(self.result[1])]
        if any(X.dtype != self.dtype for X in tensors):
            raise AssertionError(f"expected gradients of {self.dtype}, got {sorted({str(X.dtype) for X in tensors})}")
        return tensors

    def planned_bytes(self) -> int:
        """The bytes that XLA reserves for one run besides its operands: temporary buffers and outputs."""
        plan = self.program.memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes


def _meta_loss(jax, case: MetaCase, tasks: str, patches: bool):
    np, network, lr = jax.numpy, case.network, case.lr

    def convolve(x, weight):
        if patches:
            return np.einsum("ok,nkhw->nohw", weight.reshape(len(weight), -1), patches_of(x))
        return jax.lax.conv_general_dilated(x, weight, (network.stride,) * 2, ((1, 1), (1, 1)))

    def patches_of(x):
        stride, side = network.stride, -(-x.shape[-1] // network.stride)
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        # (n, channels, 3 x 3, h, w): the nine shifted images, channel by channel as in the weight.
        shifted = [
            x[:, :, i : i + stride * (side - 1) + 1 : stride, j : j + stride * (side - 1) + 1 : stride]
            for i in range(3)
            for j in range(3)
        ]
        stacked = np.stack(shifted, 2)
        return stacked.reshape(x.shape[0], -1, *stacked.shape[3:])

    def loss(theta, x, y):
        for layer in range(network.layers):
            weight, bias, scale, shift = theta[4 * layer : 4 * layer + 4]
            x = convolve(x, weight) + bias.reshape(-1, 1, 1)
            mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
            x = jax.nn.relu(x)
        weight, bias = theta[-2:]
        logits = x.mean((2, 3)) @ weight.T + bias
        return -np.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def updates(phi, G):
        out = []
        for (R, L), gradient in zip(phi, G, strict=True):
            matrices = gradient.reshape(-1, len(R), len(L))
            out.append((R.T @ ((R @ matrices @ L.T) @ L)).reshape(gradient.shape))
        return out

    def task_loss(theta, phi, x, y, query_x, query_y):
        last = None
        for _ in range(case.steps):
            G = jax.grad(loss)(theta, x, y)
            if phi and last is not None:
                # The shared-gradient identity: the loss's gradient by phi, from the update's VJP at the last step.
                products = jax.vjp(lambda phi, last=last: updates(phi, last), phi)[1](G)[0]
                phi = jax.tree.map(lambda X, dX: X + lr**2 * dX, phi, products)
            U = updates(phi, G) if phi else G
            theta = [X - lr * dX for X, dX in zip(theta, U, strict=True)]
            last = G
        return loss(theta, query_x, query_y)

    def meta_loss(theta, phi, examples):
        if tasks == "vmap":
            losses = jax.vmap(task_loss, in_axes=(None, None, 0, 0, 0, 0))(theta, phi, *examples)
        else:
            losses = jax.lax.map(lambda task: task_loss(theta, phi, *task), examples)
        return losses.mean()

    return meta_loss
