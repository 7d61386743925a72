"""Libraries that adapt one task after the other: learn2learn, TorchOpt, higher; each as its own examples use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.meta_case import Gradients, MetaCase, plain_network
from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import


class TaskLoop:
    """The meta-training loop: a task's adaptation, then backward of its share of the mean query loss.

    query_loss: (support x, support y, query x, query y) of one task -> (), after the adaptation, differentiable
    gradients: the meta-gradients after a run
    """

    def __init__(
        self,
        case: MetaCase,
        module: nn.Module,
        query_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        gradients: Callable[[], Gradients] | None = None,
    ) -> None:
        self.batch, self.module, self.query_loss = case.batch, module, query_loss
        self.gradients = gradients or (lambda: [parameter.grad for parameter in module.parameters()])

    def run(self) -> Tensor:
        self.module.zero_grad()
        tasks, total = len(self.batch.support.x), 0.0
        for task in zip(*self.batch.support, *self.batch.query, strict=True):
            loss = self.query_loss(*task) / tasks
            loss.backward()
            total = total + loss.detach()
        return total


def learn2learn(case: MetaCase) -> TaskLoop:
    """Its GBML with KroneckerTransform, or its MAML for plain gradient descent.

    Raises:
        ImportError: learn2learn is not installed.
    """
    l2l, model = light_import(), plain_network(case)
    if case.factors is None:
        meta = l2l.algorithms.MAML(model, lr=case.lr)
    else:
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=True)
        meta = l2l.algorithms.GBML(model, transform=transform, lr=case.lr, adapt_transform=True)
        meta.to(case.batch.support.x)
        kronecker_factors_to(meta.compute_update, case.factors)

    def query_loss(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        learner = meta.clone()
        for _ in range(case.steps):
            learner.adapt(F.cross_entropy(learner(x), y))
        return F.cross_entropy(learner(query_x), query_y)

    def gradients() -> Gradients:
        layers = [] if case.factors is None else [wrap.transform for wrap in meta.compute_update.transforms_modules]
        pairs = [kronecker_factors(layer.left.grad, layer.right.grad, psd=layer.psd) for layer in layers]
        return [parameter.grad for parameter in model.parameters()] + [X for pair in pairs for X in pair]

    return TaskLoop(case, meta, query_loss, gradients)


def torchopt(case: MetaCase) -> TaskLoop:
    """Plain MAML by its differentiable SGD, network and optimizer put back by reference before each task.

    Raises:
        ImportError: TorchOpt is not installed.
    """
    import torchopt as library

    model = plain_network(case)
    optimizer = library.MetaSGD(model, lr=case.lr)
    start = {
        part: library.extract_state_dict(part, by="reference", detach_buffers=True)
        if isinstance(part, nn.Module)
        else library.extract_state_dict(part, by="reference")
        for part in (model, optimizer)
    }
    parameters = list(model.parameters())

    def query_loss(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        for part, state in start.items():
            library.recover_state_dict(part, state)
        for _ in range(case.steps):
            optimizer.step(F.cross_entropy(model(x), y))
        return F.cross_entropy(model(query_x), query_y)

    # The leaves: after a run the model holds its last task's adapted tensors in their places.
    return TaskLoop(case, nn.ParameterList(parameters), query_loss)


def higher(case: MetaCase) -> TaskLoop:
    """Plain MAML by its inner-loop context around torch's SGD.

    Raises:
        ImportError: higher is not installed.
    """
    import higher as library

    model = plain_network(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr)

    def query_loss(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (learner, inner):
            for _ in range(case.steps):
                inner.step(F.cross_entropy(learner(x), y))
            return F.cross_entropy(learner(query_x), query_y)

    return TaskLoop(case, model, query_loss)
