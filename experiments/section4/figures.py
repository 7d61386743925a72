"""The numbers of Figure 1 (left) and Figure 2 of the paper.

Figure 1 (left) meta-trains SHALLOW and DEEP on sampled tasks. Figure 2 requires the population loss. The MAML loss of
`population`, a meta-batch of six tasks of two points, equals it exactly: DEEP's error after one step is quadratic in
theta, so the tasks must have the first four moments of theta; a task must have those of x, and noise orthogonal to x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import Tensor, nn

from kfo_ext.adapt import MAML
from kfo_ext.networks import deep_regression, shallow_regression
from kfo_ext.tasks import Examples, Linear, TaskBatch
from kfo_ext.updates import GradientDescent

from .losses import ALPHA, DEEP, NOISE_FLOOR, SHALLOW, A, B, C, maml_loss, numeric, value

Numbers = dict[str, Any]
# Appendix D. The paper does not state Figure 2's settings; these serve for both.
INNER_RATE = 0.1
META_RATE = 0.01
MOMENTUM = 0.9
# Not stated in the paper. At 100 support points the best loss of sampled tasks is within 3 % of the population's.
TASKS = 16
SHOTS = 100
QUERIES = 100
TEST_TASKS = 2000
# The largest number of points of a curve, and of a trajectory.
LONGEST = 40
LONGEST_TRAJECTORY = 100
# Decimal places to store.
DIGITS = 5
# Figure 2: the plane, and the starts of the four trajectories of meta-training.
SPAN = 4.5
GRID = 51
STARTS = ((1.2, 0.8), (-0.8, 1.2), (-1.2, -0.8), (0.8, -1.2))
MODELS: dict[str, Callable[[], nn.Module]] = {"SHALLOW": shallow_regression, "DEEP": deep_regression}


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """1/2 the mean squared error: the loss of equation 30."""
    return (output - target).square().mean() / 2


def learner(model: nn.Module, rate: float = INNER_RATE) -> MAML:
    """MAML of one step of plain gradient descent."""
    return MAML(model, update=GradientDescent(model.named_parameters()), lr=rate, steps=1, loss=half_squared_error)


def population() -> TaskBatch:
    """Six tasks of two points each, whose MAML loss is the population's."""
    theta = torch.tensor([math.sqrt(3), -math.sqrt(3), 0, 0, 0, 0], dtype=torch.float64)
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(6, 2).unsqueeze(2)
    noise = torch.ones_like(x)
    examples = Examples(x, theta[:, None, None] * x + noise)
    return TaskBatch(examples, examples)


def figure1_left(seeds: Sequence[int] = (0, 1, 2), iterations: int = 500) -> Numbers:
    """Compute mean squared errors of SHALLOW and DEEP on test tasks after one inner step, over meta-training.

    Args:
        seeds: seeds of the initialization and of the tasks; one curve each.
        iterations: meta-iterations.

    Returns:
        The settings; per model and seed the iterations of a curve with the errors on sampled test tasks, `mse`, and of
        the population, `population_mse`; the least population errors as lines.

    Raises:
        ValueError: there is no seed, or no iteration.
    """
    _check(iterations)
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    curves = {name: {str(seed): _meta_train(make, seed, iterations) for seed in seeds} for name, make in MODELS.items()}
    at = {ALPHA: INNER_RATE}
    lines = {
        "SHALLOW, best": 2 * value(maml_loss(SHALLOW), {**at, C: 0}),
        "DEEP, best": 2 * value(maml_loss(DEEP), {**at, A: 1 / math.sqrt(INNER_RATE), B: 0}),
        "noise": 2 * float(NOISE_FLOOR),
    }
    settings = {
        "inner_rate": INNER_RATE,
        "meta_rate": META_RATE,
        "momentum": MOMENTUM,
        "tasks": TASKS,
        "shots": SHOTS,
        "queries": QUERIES,
        "test_tasks": TEST_TASKS,
        "iterations": iterations,
        "seeds": list(seeds),
    }
    return {"settings": settings, "curves": curves, "lines": lines}


def _meta_train(make: Callable[[], nn.Module], seed: int, iterations: int) -> Numbers:
    """One curve: the errors on fixed test tasks and of the population, before and during training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maml = learner(make())
    train, test = (Linear(split, shots=SHOTS, queries=QUERIES, seed=seed) for split in ("train", "test"))
    judged = test.sample(0, TEST_TASKS)
    optimizer = torch.optim.SGD(maml.model.parameters(), lr=META_RATE, momentum=MOMENTUM)
    kept = thinned(iterations, LONGEST)
    exact = population().to(dtype=torch.float32)
    points: list[int] = []
    errors: list[float] = []
    expected: list[float] = []
    for iteration in range(iterations + 1):
        if iteration in kept:
            with torch.no_grad():
                points.append(iteration)
                errors.append(round(2 * maml(judged).loss.item(), DIGITS))
                expected.append(round(2 * maml(exact).loss.item(), DIGITS))
        if iteration < iterations:
            _step(maml, optimizer, train.sample(iteration, TASKS))
    return {"iteration": points, "mse": errors, "population_mse": expected}


def figure2(
    rate: float = INNER_RATE, iterations: int = 2000, starts: Sequence[tuple[float, float]] = STARTS
) -> Numbers:
    """Compute DEEP's MAML loss over (a, b), and trajectories of meta-training on it.

    Args:
        rate: the inner rate.
        iterations: meta-iterations of a trajectory.
        starts: the start (a, b) of each trajectory.

    Returns:
        The settings; the loss on a grid, rows of equal b; the solutions; per start the points (a, b) of its trajectory.

    Raises:
        ValueError: there is no iteration.
    """
    _check(iterations)
    axis = np.linspace(-SPAN, SPAN, GRID)
    loss = numeric(maml_loss(DEEP).subs(ALPHA, sp.Float(rate)), A, B)
    root = 1 / math.sqrt(rate)
    settings = {
        "inner_rate": rate,
        "meta_rate": META_RATE,
        "momentum": MOMENTUM,
        "iterations": iterations,
        "starts": [list(start) for start in starts],
    }
    return {
        "settings": settings,
        "axis": axis.round(DIGITS).tolist(),
        "loss": np.asarray(loss(axis[None, :], axis[:, None])).round(DIGITS).tolist(),
        "solutions": [[root, 0.0], [-root, 0.0], [0.0, root], [0.0, -root]],
        "trajectories": [_trajectory(rate, a, b, iterations) for a, b in starts],
    }


def _trajectory(rate: float, a: float, b: float, iterations: int) -> Numbers:
    model = deep_regression().double()
    first, second = model.parameters()
    with torch.no_grad():
        first.fill_(b)
        second.fill_(a)
    maml, batch = learner(model, rate), population()
    optimizer = torch.optim.SGD(model.parameters(), lr=META_RATE, momentum=MOMENTUM)
    kept = thinned(iterations, LONGEST_TRAJECTORY)
    points, places = [], []
    for iteration in range(iterations + 1):
        if iteration in kept:
            points.append(iteration)
            places.append((round(second.item(), DIGITS), round(first.item(), DIGITS)))
        if iteration < iterations:
            _step(maml, optimizer, batch)
    return {"iteration": points, "a": [place[0] for place in places], "b": [place[1] for place in places]}


def _step(maml: MAML, optimizer: torch.optim.Optimizer, batch: TaskBatch) -> None:
    optimizer.zero_grad()
    maml(batch).loss.backward()
    optimizer.step()


def thinned(iterations: int, points: int) -> set[int]:
    """Choose iterations to store, denser at the start, where curves change most.

    Args:
        iterations: the last iteration.
        points: the largest number of iterations to choose.

    Returns:
        Iterations from 0 to `iterations`, including both.
    """
    if iterations < points:
        return set(range(iterations + 1))
    return {round(iterations * (i / (points - 1)) ** 2) for i in range(points)}


def _check(iterations: int) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer of at least 1, got {iterations!r}")
