"""Loops that adapt one task after the other: learn2learn, TorchOpt and higher, as in their examples; and by hand.

With `fast` the whole loop, forward and backward, runs within `kfo_ext.fast_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.meta_case import Gradients, MetaCase, plain_network
from bench.meta_ours import copy_factors, factor_gradients, gradients_of, grads_of
from kfo_ext import KFO, fast_layers
from kfo_ext.interop import learn2learn as interop
from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.updates import GradientDescent, Update


class TaskLoop:
    """The meta-training loop: a task's adaptation, then backward of its share of the mean query loss.

    Args:
        case: the operands.
        module: holds the meta-parameters.
        query_loss: (support x, support y, query x, query y) of one task -> (), after the adaptation, differentiable.
        gradients: returns the meta-gradients after a run; by default those of the module's parameters.
        fast: run it within `fast_layers`.
    """

    def __init__(
        self,
        case: MetaCase,
        module: nn.Module,
        query_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        gradients: Callable[[], Gradients] | None = None,
        fast: bool = False,
    ) -> None:
        self.batch, self.module, self.query_loss = case.batch, module, query_loss
        self.gradients = gradients or (lambda: grads_of(module.parameters()))
        self.block: Callable[[], AbstractContextManager[None]] = fast_layers if fast else nullcontext

    def run(self) -> Tensor:
        """Compute the mean query loss and its gradients, task by task."""
        self.module.zero_grad()
        tasks, total = len(self.batch.support.x), torch.zeros(())
        with self.block():
            for task in zip(*self.batch.support, *self.batch.query, strict=True):
                loss = self.query_loss(*task) / tasks
                loss.backward()
                total = total + loss.detach()
        return total


def learn2learn(case: MetaCase, *, our_kfo: bool = False, fast: bool = False) -> TaskLoop:
    """Make the loop of its GBML, with KroneckerTransform or kfo_ext's KFO, or of its MAML for plain gradient descent.

    Args:
        case: the operands.
        our_kfo: use kfo_ext's KFO instead of its transform.
        fast: as for `TaskLoop`.

    Returns:
        The loop.

    Raises:
        ImportError: learn2learn is not installed.
    """
    l2l, model = light_import(), plain_network(case)
    if case.factors is None:
        meta = l2l.algorithms.MAML(model, lr=case.lr)
    else:
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=True)
        # KFO, which updates all parameters at once, replaces its ParameterUpdate.
        options = {"compute_update": KFO(model.named_parameters(), psd=True)} if our_kfo else {}
        meta = l2l.algorithms.GBML(model, transform=transform, lr=case.lr, adapt_transform=True, **options)
        meta.to(case.batch.support.x)
        put = copy_factors if our_kfo else kronecker_factors_to
        put(meta.compute_update, case.factors)

    def gradients() -> Gradients:
        if case.factors is None:
            return grads_of(model.parameters())
        if our_kfo:
            return grads_of(model.parameters()) + factor_gradients(meta.compute_update)
        layers: Any = [wrap.transform for wrap in meta.compute_update.transforms_modules]
        pairs = [kronecker_factors(layer.left.grad, layer.right.grad, psd=layer.psd) for layer in layers]
        return grads_of(model.parameters()) + [X for pair in pairs for X in pair]

    return TaskLoop(case, meta, by_clones(case, meta), gradients, fast)


def by_clones(case: MetaCase, meta: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The query loss of a task, as in learn2learn's examples."""

    def query_loss(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        learner = meta.clone()
        for _ in range(case.steps):
            learner.adapt(F.cross_entropy(learner(x), y))
        return F.cross_entropy(learner(query_x), query_y)

    return query_loss


def our_gbml(case: MetaCase, *, fast: bool = False) -> TaskLoop:
    """learn2learn's loop with one line replaced: kfo_ext's GBML, or its MAML for plain gradient descent."""
    model, kfo = plain_network(case), None
    meta: interop.GBML = interop.MAML(model, lr=case.lr)
    if case.factors is not None:
        transform = interop.KroneckerTransform(interop.KroneckerLinear, psd=True)
        meta = interop.GBML(model, transform=transform, lr=case.lr, adapt_transform=True)
        kfo = cast(KFO, cast(interop.ParameterUpdate, meta.compute_update).update)
        copy_factors(kfo, case.factors)
    return TaskLoop(case, meta, by_clones(case, meta), lambda: gradients_of(model, kfo), fast)


def by_hand(case: MetaCase, *, fast: bool = False) -> TaskLoop:
    """A hand-written loop: functional_call, torch.autograd.grad, and KFO, whose factors adapt by the same pass."""
    model, kfo = plain_network(case), None
    if case.factors is not None:
        kfo = KFO(model.named_parameters(), psd=True)
        copy_factors(kfo, case.factors)

    def query_loss(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        theta: dict[str, Tensor] = dict(model.named_parameters())
        phi = () if kfo is None else kfo.phi
        for step in range(case.steps):
            loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
            # The first loss does not depend on the factors.
            adapted = phi if step else ()
            grads = torch.autograd.grad(loss, [*theta.values(), *adapted], create_graph=True)
            updates = list(grads[: len(theta)])
            if kfo is not None:
                if adapted:
                    phi = tuple(row - case.lr * grad for row, grad in zip(phi, grads[len(theta) :], strict=True))
                updates = kfo.packing.unpack(kfo.rule(phi, kfo.packing.join(updates, None)), batched=False)
            theta = {name: X - case.lr * update for (name, X), update in zip(theta.items(), updates, strict=True)}
        return F.cross_entropy(functional_call(model, theta, (query_x,)), query_y)

    module = model if kfo is None else nn.ModuleList([model, kfo])
    return TaskLoop(case, module, query_loss, lambda: gradients_of(model, kfo), fast)


def by_step(case: MetaCase, *, fast: bool = False) -> TaskLoop:
    """The same loop with `Update.step`, one backward pass per step."""
    model = plain_network(case)
    update: Update = GradientDescent(model.named_parameters())
    if case.factors is not None:
        update = KFO(model.named_parameters(), psd=True)
        copy_factors(update, case.factors)
    adapted = case.factors is not None

    def query_loss(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        theta: dict[str, Tensor] = dict(model.named_parameters())
        state = None
        for _ in range(case.steps):
            loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
            theta, state = update.step(loss, theta, state, lr=case.lr, adapt_update=adapted)
        return F.cross_entropy(functional_call(model, theta, (query_x,)), query_y)

    def gradients() -> Gradients:
        return grads_of(model.parameters()) + (factor_gradients(update) if isinstance(update, KFO) else [])

    return TaskLoop(case, nn.ModuleList([model, update]), query_loss, gradients, fast)


def torchopt(case: MetaCase) -> TaskLoop:
    """Make the loop of plain MAML by its differentiable SGD; both states are restored by reference before each task.

    Args:
        case: the operands.

    Returns:
        The loop.

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

    # The leaves, since after a run the model holds the last task's adapted tensors instead.
    return TaskLoop(case, nn.ParameterList(parameters), query_loss)


def higher(case: MetaCase) -> TaskLoop:
    """Make the loop of plain MAML by its inner-loop context around torch's SGD.

    Args:
        case: the operands.

    Returns:
        The loop.

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
