"""MAML and ANIL in plain torch, task by task: the ground truth of the learners.

Nothing here is of kfo_ext: a module is called with other parameters by putting them into its slots, and the factors of
a learned update are differentiated the long way, by a second pass through the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

# (phi, [(name, gradient)]) -> updates, phi a list of tensors.
Rule = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


class Truth(NamedTuple):
    """loss (), query losses (tasks,), the outputs of each task's query, and gradients by all that is meta-learned."""

    loss: Tensor
    query_losses: Tensor
    outputs: list[Tensor]
    gradients: list[Tensor]


def call(module: nn.Module, values: Mapping[Tensor, Tensor], x: Tensor):
    """module(x) with `values[parameter]` wherever any of its modules holds that parameter."""
    held = [
        (owner, slot, parameter)
        for owner in module.modules()
        for slot, parameter in owner._parameters.items()
        if parameter is not None and parameter in values
    ]
    for owner, slot, parameter in held:
        owner._parameters[slot] = values[parameter]
    try:
        return module(x)
    finally:
        for owner, slot, parameter in held:
            owner._parameters[slot] = parameter


def plain_maml(
    model: nn.Module,
    batch,
    loss: Callable,
    *,
    lr: float,
    steps: int,
    first_order: bool = False,
    head: bool = False,
    only: Collection[str] | None = None,
    rule: Rule | Sequence[Rule] | None = None,
    phi: list[Tensor] = (),
    adapt_update: bool = False,
) -> Truth:
    """The meta-loss of a batch and its gradients by the model's trainable parameters, then by phi.

    head: adapt `model.head` alone, on features of support and query together.
    only: the names of the parameters to adapt; None for all.
    rule: of all steps, or one for each.
    """
    adapted = model.head if head else model
    named = adapted.named_parameters()
    parameters = [p for name, p in named if p.requires_grad and (only is None or name in only)]
    losses, outputs = [], []
    for sx, sy, qx, qy in zip(*batch.support, *batch.query):
        if head:
            sx, qx = model.features(torch.cat([sx, qx])).split([len(sx), len(qx)])
        theta, own = list(parameters), list(phi)
        for step in range(steps):
            value = loss(call(adapted, dict(zip(parameters, theta)), sx), sy)
            grads = torch.autograd.grad(value, theta, create_graph=True, materialize_grads=True, allow_unused=True)
            if adapt_update and step:
                inner = torch.autograd.grad(value, own, create_graph=True, materialize_grads=True, allow_unused=True)
                own = [row - lr * grad for row, grad in zip(own, inner)]
            if first_order:
                grads = [grad.detach() for grad in grads]
            mine = rule[step] if isinstance(rule, Sequence) else rule
            updates = grads if mine is None else mine(own, list(grads))
            theta = [value - lr * update for value, update in zip(theta, updates)]
        outputs.append(call(adapted, dict(zip(parameters, theta)), qx))
        losses.append(loss(outputs[-1], qy))
    losses = torch.stack(losses)
    learned = [p for p in model.parameters() if p.requires_grad] + list(phi)
    gradients = torch.autograd.grad(losses.mean(), learned, materialize_grads=True, allow_unused=True)
    return Truth(losses.mean().detach(), losses.detach(), outputs, list(gradients))


@contextmanager
def right_weight_norm() -> Iterator[None]:
    """Composes weight norm of simple functions: the second derivative of torch 2.13's own is wrong."""

    def compose(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        return g * v / v.norm(dim=[d for d in range(v.dim()) if d != dim], keepdim=True)

    # Where the parametrization and the older hook look it up.
    owners = (torch, sys.modules["torch.nn.utils.weight_norm"])
    own = [owner._weight_norm for owner in owners]
    for owner in owners:
        owner._weight_norm = compose
    try:
        yield
    finally:
        for owner, function in zip(owners, own):
            owner._weight_norm = function


def plain_kfo(
    *, psd: bool = True, bias: bool = False, layers: int = 1, sides: list[str] | None = None, scale: float = 1.0
) -> Rule:
    """KFO's update of plain gradients, by its packed phi: R, L (and bias) of each layer, tanh between layers.

    scale: s of g + f(s g) / s, with more than one layer.
    sides: the factors of each parameter, "RL", "R" or "L", an identity for the other; "" is plain gradient descent.
    """

    def triple(shape):
        return {1: (1, *shape, 1), 2: (1, *shape)}.get(len(shape), (*shape[:2], shape[2:].numel()))

    def factors(rows: Iterator[Tensor], sizes: list[int], present: list[bool]) -> list[Tensor]:
        """(n, n) each; no row is there for factors that no parameter has."""
        identities = [torch.eye(n, dtype=torch.float64) for n in sizes]
        if not any(present):
            return identities
        pieces = next(rows).split([n * n if here else 0 for n, here in zip(sizes, present)])
        return [x.view(n, n) if here else one for x, n, here, one in zip(pieces, sizes, present, identities)]

    def rule(phi: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        has = ["RL"] * len(gradients) if sides is None else sides
        covered = [(g, side) for g, side in zip(gradients, has) if side]
        sizes = [triple(g.shape) for g, _ in covered]
        hidden = [scale * g.reshape(size) for (g, _), size in zip(covered, sizes)]
        rows = (row[0] for row in phi)
        for layer in range(layers):
            Rs = factors(rows, [p for _, p, _ in sizes], ["R" in side for _, side in covered])
            Ls = factors(rows, [q for _, _, q in sizes], ["L" in side for _, side in covered])
            if layer:
                hidden = [X.tanh() for X in hidden]
            if psd and (layers == 1 or layer < layers - 1):
                Rs, Ls = [R.T @ R for R in Rs], [L.T @ L for L in Ls]
            hidden = [R.T @ X @ L for R, X, L in zip(Rs, hidden, Ls)]
            if bias:
                terms = next(rows).split([p * q for _, p, q in sizes])
                hidden = [X + term.view(p, q) for X, term, (_, p, q) in zip(hidden, terms, sizes)]
        updates = (
            X.reshape(g.shape) if layers == 1 else g + X.reshape(g.shape) / scale for X, (g, _) in zip(hidden, covered)
        )
        return [next(updates) if side else g for g, side in zip(gradients, has)]

    return rule


def measured(learner, batch) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """What a learner of kfo_ext gives: loss, query losses, metrics and gradients in the order of `plain_maml`."""
    result = learner(batch)
    learned = [p for p in learner.model.parameters() if p.requires_grad]
    learned += list(learner.update.phi)
    gradients = torch.autograd.grad(result.loss, learned, materialize_grads=True, allow_unused=True)
    return result.loss.detach(), result.query_losses, result.metrics, list(gradients)


def assert_equal_truth(learner, batch, truth: Truth, tolerance: float = 1e-9) -> None:
    """Asserts that loss, query losses and meta-gradients are those of the truth."""
    loss, losses, _, gradients = measured(learner, batch)
    # A bias before batch norm has no gradient but the rounding of the others.
    sizes = [gradient.abs().max() for gradient in truth.gradients if gradient.numel()]
    largest = max([1.0, *(size.item() for size in sizes if size.isfinite())])
    for name, ours, expected in (
        ("loss", loss, truth.loss),
        ("query losses", losses, truth.query_losses),
        *((f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(gradients, truth.gradients, strict=True))),
    ):
        torch.testing.assert_close(
            ours,
            expected,
            rtol=tolerance,
            atol=tolerance * largest,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
