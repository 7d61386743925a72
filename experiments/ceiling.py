"""The upper line of Figure 3: softmax regression trained on all available images of a task's classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kfo_ext.tasks import TaskFamily

# Candidate penalties of the squared weights; validation tasks choose one.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = 200


def accuracies(family: TaskFamily, tasks: int, penalty: float) -> list[float]:
    """Train softmax regression to its optimum on the support of each task.

    Args:
        family: a classification family, with as many shots as the classes have images to spare.
        tasks: number of tasks, 0 .. tasks - 1.
        penalty: weight of half the squared weights, relative to the mean loss; biases are not penalized.

    Returns:
        The query accuracy on each task.

    Raises:
        ValueError: there is no task, or the penalty is not above 0.
    """
    if tasks < 1:
        raise ValueError(f"tasks: expected at least 1, got {tasks}")
    if not penalty > 0:
        raise ValueError(f"penalty: expected a number above 0, got {penalty}")
    found = []
    for index in range(tasks):
        support, query = family.sample(index, 1)
        weight, bias = fitted(support.x[0].flatten(1).double(), support.y[0], penalty)
        predicted = (query.x[0].flatten(1).double() @ weight.T + bias).argmax(1)
        found.append((predicted == query.y[0]).double().mean().item())
    return found


def fitted(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,) of the convex problem, by L-BFGS from zero; x: (n, d), y: (n,)."""
    classes = int(y.max()) + 1
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def chosen_penalty(family: TaskFamily, tasks: int) -> float:
    """The penalty with the best mean accuracy on tasks of other classes."""
    means = {penalty: sum(accuracies(family, tasks, penalty)) for penalty in PENALTIES}
    return max(means, key=lambda penalty: means[penalty])
