"""Floors for the paper's numbers: accuracies on the same tasks without an inner loop.

    nearest_centroid        the class whose mean of raw pixels is nearest; nothing is learned
    train_prototypical      a prototypical network: the class whose mean of learned features is nearest

Both take any family of classification tasks. Task i of a list is `family.sample(i, 1)`, as in
`kfo_ext.trainer.evaluate`: accuracies of the two compare task by task.

Source: Snell et al. 2017, Prototypical Networks for Few-shot Learning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from kfo_ext.runs import checkpoint
from kfo_ext.tasks import Examples, TaskBatch, TaskFamily
from kfo_ext.tasks.checks import check_count, check_number
from kfo_ext.trainer.evaluation import Cancelled, fingerprint

# Maps a meta-batch to one with (T, n, d) features instead of inputs.
Embed = Callable[[TaskBatch], TaskBatch]


def nearest_centroid(family: TaskFamily, tasks: int) -> list[float]:
    """Classify by the nearest class mean of raw inputs (Euclidean).

    Args:
        family: a classification family.
        tasks: number of tasks, 0 .. tasks - 1.

    Returns:
        The accuracy on each task.

    Raises:
        ValueError: there is no task, or tasks are no classification.
        TypeError: the number of tasks is no integer.
        FloatingPointError: a distance is not finite.
    """
    return _accuracies(_raw, family, tasks)


def evaluate_prototypical(network: nn.Module, family: TaskFamily, tasks: int) -> list[float]:
    """Classify by the nearest class mean of the network's features.

    Each task is a separate forward, so that a task's accuracy does not depend on the others.

    Args:
        network: as for `prototypical_loss`.
        family: a classification family.
        tasks: number of tasks, 0 .. tasks - 1.

    Returns:
        The accuracy on each task.

    Raises:
        ValueError: as `nearest_centroid` and `prototypical_loss`.
        TypeError: as `nearest_centroid` and `prototypical_loss`.
        FloatingPointError: a distance is not finite.
    """
    return _accuracies(partial(_embedded, network), family, tasks)


def prototypical_loss(network: nn.Module, batch: TaskBatch) -> Tensor:
    """Return the mean over tasks and queries of the cross-entropy with minus squared distances as logits.

    The forward is one torch.func.vmap over the tasks: batch statistics are over the support and query examples of one
    task together, as in ANIL, and never mix tasks.

    Args:
        network: a module with features(x), such as the package's CNN, without running statistics; its head is not used.
        batch: classes 0 to ways - 1, each with at least one support example in every task.

    Returns:
        The loss, ().

    Raises:
        ValueError: the network has running statistics, or tasks are no such classification.
        TypeError: the network has no features.
    """
    distances, y = _distances(_embedded(network, batch))
    return cross_entropy(-distances.flatten(0, 1), y.flatten())


def train_prototypical(
    network: nn.Module,
    family: TaskFamily,
    validation: TaskFamily,
    *,
    folder: Path,
    iterations: int,
    lr: float = 1e-3,
    batch: int = 16,
    every: int = 100,
    validation_tasks: int = 300,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[int, float]:
    """Train a network's features episodically with Adam, and load the values that were best on validation.

    Nothing is drawn here: the network's initialization and the families' seeds determine every number. A stopped run
    resumes from its folder, given the network with its initialization again, and gives the same result.

    Args:
        network: as for `prototypical_loss`.
        family: iteration i trains on its meta-batch i - 1.
        validation: tasks of other classes.
        folder: folder of the run's state, `prototypical.pt`, which is replaced atomically.
        iterations: the total, a multiple of `every`; a finished run can be extended.
        lr: learning rate of Adam, constant.
        batch: tasks per iteration.
        every: iterations between validations; each validation saves the state.
        validation_tasks: number of tasks per validation, 0 .. validation_tasks - 1.
        cancelled: read before each iteration; once true, the state is saved and the training ends.

    Returns:
        The mean accuracy of each validation by its iteration; the network has the values of the first highest one.

    Raises:
        ValueError: an argument is out of range, or the folder holds another run or a longer one.
        TypeError: an argument has another type.
        FloatingPointError: a loss or a distance is not finite.
        Cancelled: `cancelled` was true.
    """
    for name, value in (("batch", batch), ("every", every), ("validation_tasks", validation_tasks)):
        check_count(name, value, 1)
    check_count("iterations", iterations, 1)
    if iterations % every:
        raise ValueError(f"iterations: expected a multiple of every = {every}, got {iterations}")
    check_number("lr", lr, 0)
    made_for = {
        "start": _digest(network),
        "family": fingerprint(family),
        "validation": fingerprint(validation),
        "lr": float(lr),
        "batch": batch,
        "every": every,
        "validation_tasks": validation_tasks,
    }
    # The head has no gradient, so it does not change.
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prototypical.pt"
    done, scores, best = _restored(path, made_for, network, optimizer) if path.exists() else (0, {}, {})
    if done > iterations:
        raise ValueError(f"iterations: expected at least {done}, where the run in {folder} is, got {iterations}")

    def save() -> None:
        state = {
            "config": made_for,
            "progress": {"iteration": done, "scores": scores},
            "learner": {"last": network.state_dict(), "best": best},
            "optimizer": checkpoint.optimizer_values(optimizer),
            "rng": {},
        }
        checkpoint.save(path, state)

    like = next(network.parameters())
    while done < iterations:
        if cancelled():
            save()
            raise Cancelled
        loss = prototypical_loss(network, family.sample(done, batch).to(like.device, like.dtype))
        if not loss.isfinite():
            raise FloatingPointError(f"iteration {done + 1}: the loss is {loss.item()}; a smaller lr may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        if done % every == 0:
            accuracies = evaluate_prototypical(network, validation, validation_tasks)
            score = sum(accuracies) / len(accuracies)
            if score > max(scores.values(), default=-1.0):
                best = {name: value.detach().clone() for name, value in network.state_dict().items()}
            scores[done] = score
            save()
    network.load_state_dict(best)
    return scores


def _restored(
    path: Path, made_for: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[int, float], dict[str, Tensor]]:
    """The iteration, scores and best values of a saved run; loads its last values into network and optimizer."""
    state = checkpoint.load(path)
    for name, value in made_for.items():
        other = state["config"].get(name)
        if other != value:
            raise ValueError(f"{path}: expected a run with {name} = {value}, got {other}: use a new folder")
    checkpoint.restore_learner(path, network, state["learner"]["last"])
    checkpoint.restore_optimizer(path, optimizer, state["optimizer"])
    progress = state["progress"]
    return progress["iteration"], progress["scores"], state["learner"]["best"]


def _accuracies(embed: Embed, family: TaskFamily, tasks: int) -> list[float]:
    check_count("tasks", tasks, 1)
    accuracies = []
    with torch.no_grad():
        for index in range(tasks):
            distances, y = _distances(embed(family.sample(index, 1)))
            if not distances.isfinite().all():
                raise FloatingPointError(f"task {index} of the list: a distance is not finite")
            accuracies.append((distances.argmin(2) == y).double().mean().item())
    return accuracies


def _raw(batch: TaskBatch) -> TaskBatch:
    # In float64: rounding in float32 could exchange two classes at nearly equal distances.
    return TaskBatch(*(Examples(part.x.flatten(2).double(), part.y) for part in batch))


def _embedded(network: nn.Module, batch: TaskBatch) -> TaskBatch:
    features: Any = getattr(network, "features", None)
    if not callable(features):
        raise TypeError(f"network: expected a module with a method features(x), got {type(network).__name__}")
    if any(name.endswith("running_mean") for name, _ in network.named_buffers()):
        raise ValueError(
            "network: expected batch norm by batch statistics, got running statistics: make it with "
            "track_running_stats=False"
        )
    like = next(network.parameters())
    support, query = batch.to(like.device, like.dtype)
    x = torch.func.vmap(features)(torch.cat([support.x, query.x], 1)).flatten(2)
    ours, theirs = x.split([support.x.shape[1], query.x.shape[1]], 1)
    return TaskBatch(Examples(ours, support.y), Examples(theirs, query.y))


def _distances(embedded: TaskBatch) -> tuple[Tensor, Tensor]:
    """Squared distances from each query to the mean of each class's support, (T, m, ways), and the queries' classes."""
    (x, y), (query, target) = embedded
    members = _members(y, target).to(x.dtype)
    means = members.mT @ x / members.sum(1).unsqueeze(2)
    return (query.unsqueeze(2) - means.unsqueeze(1)).square().sum(3), target


def _members(y: Tensor, target: Tensor) -> Tensor:
    """(T, n, ways): whether each support example is of each class; raises ValueError for labels that are no classes."""
    for name, labels in (("support", y), ("query", target)):
        if labels.is_floating_point() or labels.dim() != 2:
            raise ValueError(f"{name}.y: expected classes (T, n), got {tuple(labels.shape)} {labels.dtype}")
        if labels.numel() == 0 or labels.min() < 0:
            raise ValueError(f"{name}.y: expected examples of classes 0 to ways - 1, got {labels.tolist()}")
    ways = int(max(y.max(), target.max())) + 1
    # Compared first, since class numbers of a whole data set would allocate a huge tensor.
    members = one_hot(y.long(), ways) if ways <= y.shape[1] else None
    if members is None or bool((members.sum(1) == 0).any()):
        raise ValueError(f"support.y: expected an example of each class, 0 to {ways - 1}, in every task; some has none")
    return members


def _digest(network: nn.Module) -> str:
    """A hash of the names and values of a network's state."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().double().contiguous().numpy())
    return digest.hexdigest()
