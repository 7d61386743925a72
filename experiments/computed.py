"""Functions that the registry names; they return plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kfo_ext.networks import cifar_fs_cnn, omniglot_cnn
from kfo_ext.tasks import TaskFamily, make_family
from kfo_ext.trainer import mean_interval
from kfo_ext.trainer.recipe import EVALUATION_SEED
from kfo_ext.trainer.signals import stop_requested

from .ceiling import accuracies, chosen_penalty
from .entry import Roots
from .floors import evaluate_prototypical, nearest_centroid, train_prototypical
from .jobs import encoded
from .section4.figures import figure1_left, figure2
from .synthetic import claims, logistic

NETWORKS = {"omniglot": omniglot_cnn, "cifar_fs": cifar_fs_cnn}
QUERIES = 25


def floors(
    *,
    roots: Roots,
    folder: Path,
    data: str,
    options: Mapping[str, Any],
    tasks: int,
    seeds: int,
    iterations: int,
    every: int,
    validation_tasks: int,
) -> dict[str, Any]:
    """Evaluate nearest class means of pixels, and prototypical networks with the features of CNN(2).

    Args:
        roots: the folder of each data set.
        folder: folder of the training states.
        data: the name of the data set's folder.
        options: options of its task family, including `family`.
        tasks: number of test tasks.
        seeds: number of networks; 0 for none.
        iterations: see `train_prototypical`.
        every: see `train_prototypical`.
        validation_tasks: see `train_prototypical`.

    Returns:
        Scores of `nearest_centroid`, and of each seed's network under `prototypical`.
    """
    test = _family(roots, data, options, "test", EVALUATION_SEED)
    value: dict[str, Any] = {"nearest_centroid": _scored(nearest_centroid(test, tasks)), "prototypical": []}
    validation = _family(roots, data, options, "validation", EVALUATION_SEED)
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = NETWORKS[data](init="torch")
        with stop_requested() as stop:
            curve = train_prototypical(
                network,
                _family(roots, data, options, "train", seed),
                validation,
                folder=folder / str(seed),
                iterations=iterations,
                every=every,
                validation_tasks=validation_tasks,
                cancelled=stop,
            )
        scores = _scored(evaluate_prototypical(network, test, tasks))
        value["prototypical"].append(
            {"seed": seed, **scores, "at": list(curve), "accuracy": [round(score, 5) for score in curve.values()]}
        )
    return value


def binary_logistic(*, roots: Roots, folder: Path, seeds: int, iterations: int, tasks: int) -> dict[str, Any]:
    """Figure 1 right, Figures B.1 and B.3, and the claim of appendix B.4: see `logistic`."""
    del roots, folder
    result = logistic(range(seeds), iterations, tasks)
    return {**result, "claims": claims(result)}


def regression(*, roots: Roots, folder: Path, seeds: int, iterations: int) -> dict[str, Any]:
    """Figure 1 left: SHALLOW and DEEP by MAML."""
    del roots, folder
    return figure1_left(tuple(range(seeds)), iterations)


def landscape(*, roots: Roots, folder: Path, iterations: int) -> dict[str, Any]:
    """Figure 2: the loss of DEEP over its parameters, and four trajectories."""
    del roots, folder
    return figure2(iterations=iterations)


def upper_line(
    *, roots: Roots, folder: Path, data: str, options: Mapping[str, Any], tasks: int, validation_tasks: int
) -> dict[str, Any]:
    """Evaluate softmax regression trained on all images that the classes of a task can spare.

    Args:
        roots: the folder of each data set.
        folder: not used.
        data: the name of the data set's folder.
        options: as for `floors`, with the numbers of shots and queries.
        tasks: number of test tasks.
        validation_tasks: number of tasks that choose the penalty.

    Returns:
        The penalty, the number of tasks, the mean accuracy and its interval.
    """
    del folder
    penalty = chosen_penalty(_family(roots, data, options, "validation", EVALUATION_SEED), validation_tasks)
    scores = mean_interval(accuracies(_family(roots, data, options, "test", EVALUATION_SEED), tasks, penalty))
    return {"penalty": penalty, "tasks": tasks, "mean": scores.mean, "interval": scores.half}


def _family(roots: Roots, data: str, options: Mapping[str, Any], split: str, seed: int) -> TaskFamily:
    chosen = dict(options)
    return make_family(chosen.pop("family"), split, seed=seed, root=roots[data], **chosen)


def _scored(scores: list[float]) -> dict[str, Any]:
    mean, half = mean_interval(scores)
    return {"mean": mean, "interval": half, "correct": encoded(scores, QUERIES), "queries": QUERIES}
