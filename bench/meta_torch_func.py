"""The meta-iteration in torch.func: functional_call and grad per task, vmap over tasks, grad of the mean query loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp, vmap
from torch.utils._pytree import tree_map

from bench.meta_case import Gradients, MetaCase, SpatialMean, plain_network
from kfo_ext import KFO
from kfo_ext.functional import batch_norm_relu, conv2d

# Meta-parameters as a tree of tensors.
Phi = list[tuple[Tensor, Tensor]] | tuple[Tensor, ...]


class ComposedBatchNorm(nn.Module):
    """Batch norm composed of elementwise operations and means.

    Under vmap the second derivative of torch's own (2.13) is wrong without an error: that of the weight's gradient by
    x.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised, scaled and shifted x."""
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        normal = (x - mean) * (variance + 1e-5).rsqrt()
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class TorchFunc:
    """All tasks at once.

    Args:
        case: the operands.
        compiled: the backend of torch.compile that compiles the whole as one graph; None: eager.
        batch_norm: the module in the network.
    """

    def __init__(
        self, case: MetaCase, *, compiled: str | None = None, batch_norm: type[nn.Module] = ComposedBatchNorm
    ) -> None:
        self._prepare(case, plain_network(case, batch_norm), case.factors or [], updates, compiled)

    def _prepare(
        self,
        case: MetaCase,
        model: nn.Module,
        phi: Phi,
        updates: Callable[[Phi, list[Tensor]], list[Tensor]],
        compiled: str | None,
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.theta = [parameter.detach() for parameter in model.parameters()]
        self.phi = phi
        self.examples = (*case.batch.support, *case.batch.query)
        self.result: tuple | None = None

        def loss(theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(model, dict(zip(self.names, theta)), (x,)), y)

        def task_loss(theta, phi, x, y, query_x, query_y):
            last = None
            for _ in range(case.steps):
                G = grad(loss)(theta, x, y)
                if phi and last is not None:
                    # The shared-gradient identity: the loss's gradient by phi, from the update's VJP at the last step.
                    products = vjp(lambda phi, last=last: updates(phi, last), phi)[1](G)[0]
                    phi = tree_map(lambda X, dX: X + case.lr**2 * dX, phi, products)
                U = updates(phi, G) if phi else G
                theta = [X - case.lr * dX for X, dX in zip(theta, U)]
                last = G
            return loss(theta, query_x, query_y)

        def meta_loss(theta, phi, examples):
            return vmap(task_loss, in_dims=(None, None, 0, 0, 0, 0))(theta, phi, *examples).mean()

        self.meta_gradients = grad_and_value(meta_loss, argnums=(0, 1) if self.phi else 0)
        if compiled is not None:
            # A graph of another contender's case must not be reused here, nor count against the recompile limit.
            torch._dynamo.reset()
            self.meta_gradients = torch.compile(self.meta_gradients, backend=compiled, fullgraph=True, dynamic=False)

    def run(self) -> Tensor:
        """Compute the loss and the meta-gradients."""
        self.result = self.meta_gradients(self.theta, self.phi, self.examples)
        return self.result[1]

    def gradients(self) -> Gradients:
        """The meta-gradients of the last run."""
        if not self.phi:
            return list(self.result[0])
        theta, phi = self.result[0]
        return [*theta, *(X for pair in phi for X in pair)]


class FastBlock(nn.Module):
    """(images, height, width, channels): a block of kfo_ext's operators, with torch's parameters in order."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        """Convolution, batch norm and ReLU."""
        y = conv2d(x[None], self.conv.weight[None], stride=self.conv.stride[0], padding=self.conv.padding[0])[0]
        y = y + self.conv.bias
        rows = batch_norm_relu(y.flatten(0, 2)[None], self.norm.weight[None], self.norm.bias[None])[0]
        return rows.unflatten(0, y.shape[:3])


class ChannelsLast(nn.Module):
    """(images, channels, height, width) -> (images, height, width, channels), or back."""

    def __init__(self, *, back: bool = False) -> None:
        super().__init__()
        self.order = (0, 3, 1, 2) if back else (0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The permuted x."""
        return x.permute(self.order)


class TorchFuncFast(TorchFunc):
    """The same program with kfo_ext's convolution, batch norm and, instead of `updates`, `KFO.rule`."""

    def __init__(self, case: MetaCase) -> None:
        *layers, head = plain_network(case, ComposedBatchNorm)
        blocks = [FastBlock(conv, norm) for conv, norm in zip(layers[0:-1:3], layers[1:-1:3])]
        model = nn.Sequential(ChannelsLast(), *blocks, ChannelsLast(back=True), SpatialMean(), head)
        kfo = KFO(model.named_parameters())
        self.problems = kfo.problems
        phi: Phi = ()
        if case.factors:
            phi = tuple(torch.cat([X.reshape(1, -1) for X in side], dim=1) for side in zip(*case.factors))

        def updates(phi: Phi, G: list[Tensor]) -> list[Tensor]:
            return kfo.packing.unpack(kfo.rule(phi, kfo.packing.pack(G)), batched=False)

        self._prepare(case, model, phi, updates, None)

    def gradients(self) -> Gradients:
        """The meta-gradients of the last run, the factors' unpacked."""
        if not self.phi:
            return super().gradients()
        theta, (dR, dL) = self.result[0]
        pairs = zip(self.problems.R.unpack(dR, batched=False), self.problems.L.unpack(dL, batched=False))
        return [*theta, *(X for pair in pairs for X in pair)]


def updates(phi: list[tuple[Tensor, Tensor]], G: list[Tensor]) -> list[Tensor]:
    """R^T R G L^T L per parameter; G in the parameters' shapes, R (p, p), L (q, q)."""
    out = []
    for (R, L), gradient in zip(phi, G):
        matrices = gradient.reshape(-1, len(R), len(L))
        out.append((R.mT @ ((R @ matrices @ L.mT) @ L)).reshape(gradient.shape))
    return out
