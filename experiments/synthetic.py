"""Binary logistic regression, its LinNets, and MAML: Figure 1 right, Figures B.1 and B.3, and the claim of B.4.

The paper states neither the sizes of the tasks nor how a prediction counts as right. Both metrics are here:

- sign: the prediction is 1 where the logit is positive, the usual accuracy;
- sampled: the prediction is drawn from Bernoulli(sigma(logit)), as section 4.2 writes it. It is the exact expectation
  over the draws, the mean of sigma(logit) where y = 1 and of 1 - sigma(logit) where y = 0.

"2 or 3 linear layers" are counted in total: a^T B x of section 4.2 has two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from kfo_ext import MAML
from kfo_ext.networks import LinNet, logistic_regression
from kfo_ext.tasks import Examples, TaskBatch, TaskFamily, make_family
from kfo_ext.tasks.checks import check_count

from .collapse import collapsed
from .intervals import UNDECIDED, Range, half_width, verdict

DIMENSION, INNER_RATE, STEPS, META_BATCH = 2, 0.9, 1, 32
# Not in the paper; the figures are drawn for both supports.
SUPPORTS, QUERIES = (10, 100), 100
# The best possible accuracy. theta^T x has Laplace's distribution, so the last one is E sigma(|theta^T x|) = ln 2.
BEST = {"separable": 1.0, "bernoulli": math.log(2)}
# The number of points of a curve after its start.
POINTS = 30
# Every run is evaluated on the same unseen tasks.
TEST_SEED = 0
TRAINING, UNSEEN, COLLAPSED = "training tasks", "unseen tasks", "collapsed first, unseen tasks"


class Model(NamedTuple):
    """A row of table D.5.

    Attributes:
        widths: widths of the LinNet's hidden layers; empty for the single layer of logistic regression.
        rate: the outer rate of SGD.
    """

    widths: tuple[int, ...]
    rate: float


MODELS = {"LR": Model((), 0.01), "LinNet(2)": Model((2,), 0.1), "LinNet(3)": Model((2, 2), 0.1)}
LINNETS = ("LinNet(2)", "LinNet(3)")


def sign_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """(..., n, 1) each to (...), the fraction of right predictions 1[logit > 0]."""
    return ((logits > 0) == (y > 0.5)).double().mean((-2, -1))


def sampled_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """(..., n, 1) each to (...), the expected fraction of right predictions drawn from sigma(logit)."""
    return torch.where(y > 0.5, logits, -logits).double().sigmoid().mean((-2, -1))


METRICS = {"sign": sign_accuracy, "sampled": sampled_accuracy}


def make_learner(model: str, seed: int) -> MAML:
    """MAML of a row of `MODELS`, its network initialised from `seed`; it adapts by gradient descent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = logistic_regression(DIMENSION)
        if widths := MODELS[model].widths:
            network = LinNet(network, widths)
    return MAML(network, lr=INNER_RATE, steps=STEPS, loss=binary_cross_entropy_with_logits, metric=sign_accuracy)


@torch.no_grad()
def accuracies(learner: MAML, batch: TaskBatch) -> dict[str, Tensor]:
    """The accuracies (tasks,) by metric; all tasks adapt at once, and one forward of their queries gives both."""
    logits = learner.adapt(batch.support).predict(batch.query.x)
    return {name: metric(logits, batch.query.y) for name, metric in METRICS.items()}


def logistic(seeds: Sequence[int], iterations: int, tasks: int) -> dict[str, Any]:
    """Meta-train every model for both kinds of labels and both supports.

    Args:
        seeds: seeds of the networks and the training tasks, each once; the unseen tasks are the same for all.
        iterations: meta-iterations.
        tasks: number of unseen tasks, and of training tasks, to evaluate on.

    Returns:
        A summary that JSON can hold: `settings`; `iterations`, those of the curves' points from start to end; and
        `panels`, one for each kind of labels, support and metric. A panel has `curves` by name: `mean` over seeds at
        each point and, for the end, `seeds`, one value each, and the half widths `over_tasks` and `over_seeds` of the
        95 % intervals; the latter is None for a single seed. It has `differences` "A - B" of two curves at the end,
        paired by task and seed, in the same form, with `mean` a number.

    Raises:
        ValueError: a number is out of range, there is no seed or one twice, or more tasks than were trained on.
        TypeError: a number is no integer.
        FloatingPointError: a loss is not finite.
    """
    check_count("iterations", iterations, 1)
    check_count("tasks", tasks, 2)
    for seed in seeds:
        check_count("seeds", seed, 0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, and each once, got {list(seeds)}")
    if tasks > iterations * META_BATCH:
        raise ValueError(
            f"tasks: expected at most the {iterations * META_BATCH} that {iterations} iterations train on, got {tasks}"
        )
    points = sorted({round(i * iterations / POINTS) for i in range(POINTS + 1)})
    panels = []
    for labels in BEST:
        for support in SUPPORTS:
            runs = {name: [_run(name, labels, support, seed, points, tasks) for seed in seeds] for name in MODELS}
            panels += [
                {"labels": labels, "support": support, "metric": metric, **_panel(runs, metric)} for metric in METRICS
            ]
    return {"settings": _settings(seeds, iterations, tasks), "iterations": points, "panels": panels}


def _settings(seeds: Sequence[int], iterations: int, tasks: int) -> dict[str, Any]:
    return {
        "seeds": list(seeds),
        "iterations": iterations,
        "tasks": tasks,
        "dimension": DIMENSION,
        "inner_rate": INNER_RATE,
        "steps": STEPS,
        "outer_optimizer": "SGD, no momentum",
        "outer_rates": {name: model.rate for name, model in MODELS.items()},
        "layers": {name: len(model.widths) + 1 for name, model in MODELS.items()},
        "widths": {name: list(model.widths) for name, model in MODELS.items()},
        "meta_batch": META_BATCH,
        "supports": list(SUPPORTS),
        "queries": QUERIES,
        "best_accuracy": BEST,
        "training_tasks": "the first of the stream that the model was meta-trained on, none of which comes twice",
        "unseen_tasks": f"of the test stream, seed {TEST_SEED}",
        "sampled": "the exact expectation over draws of the prediction from Bernoulli(sigma(logit))",
    }


# Accuracies (points, tasks) by the part of a curve's name and the metric.
History = dict[tuple[str, str], Tensor]


def _run(model: str, labels: str, support: int, seed: int, points: Sequence[int], tasks: int) -> History:
    """The accuracies of one meta-training, task by task at each point."""
    learner = make_learner(model, seed)
    sizes: dict[str, Any] = {"shots": support, "queries": QUERIES, "dimension": DIMENSION, "labels": labels}
    training = make_family("logistic", "train", seed=seed, **sizes)
    unseen = make_family("logistic", "test", seed=TEST_SEED, **sizes).sample(0, tasks)
    first = first_tasks(training, tasks)
    optimizer = torch.optim.SGD(learner.parameters(), lr=MODELS[model].rate)
    history: dict[tuple[str, str], list[Tensor]] = {}
    for iteration in range(points[-1] + 1):
        if iteration in points:
            measured = {TRAINING: accuracies(learner, first), UNSEEN: accuracies(learner, unseen)}
            if model in LINNETS:
                measured[COLLAPSED] = accuracies(collapsed(learner), unseen)
            for part, scores in measured.items():
                for metric, values in scores.items():
                    history.setdefault((part, metric), []).append(values)
        if iteration < points[-1]:
            result = learner(training.sample(iteration, META_BATCH))
            result.check_finite()
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
    return {key: torch.stack(values) for key, values in history.items()}


def first_tasks(family: TaskFamily, tasks: int) -> TaskBatch:
    """The first tasks of a stream of meta-batches, as one."""
    batches = [family.sample(index, META_BATCH) for index in range(-(-tasks // META_BATCH))]
    return TaskBatch(*(Examples(*(torch.cat(X)[:tasks] for X in zip(*part))) for part in zip(*batches)))


def _panel(runs: dict[str, list[History]], metric: str) -> dict[str, Any]:
    """Curves and differences of one metric."""
    curves = {
        f"{name}, {part}": torch.stack([history[part, metric] for history in histories])
        for name, histories in runs.items()
        for part in (TRAINING, UNSEEN, COLLAPSED)
        if (part, metric) in histories[0]
    }
    pairs = {pair for claim in CLAIMS for pair in claim.of if isinstance(pair, tuple)}
    return {
        "curves": {
            name: {"mean": _rounded(values.mean((0, 2))), **_end(values[:, -1])} for name, values in curves.items()
        },
        "differences": {
            f"{a} - {b}": {"mean": _rounded(difference.mean()), **_end(difference)}
            for a, b in sorted(pairs)
            for difference in [curves[a][:, -1] - curves[b][:, -1]]
        },
    }


def _end(values: Tensor) -> dict[str, Any]:
    """The means over tasks of each seed, and both half widths, of values (seeds, tasks)."""
    means = values.mean(1)
    return {
        "seeds": _rounded(means),
        "over_tasks": half_width(values.mean(0)),
        "over_seeds": half_width(means),
    }


def _rounded(values: Tensor) -> Any:
    numbers = values.tolist()
    return [round(each, 6) for each in numbers] if isinstance(numbers, list) else round(numbers, 6)


class Claim(NamedTuple):
    """A claim of the paper, as a range that values lie in.

    Attributes:
        text: the claim, and the range in words.
        of: names of curves, or pairs of them for differences.
        claimed: the range.
    """

    text: str
    of: tuple[str | tuple[str, str], ...]
    claimed: Range


# Without 0 itself, which closed ranges would include.
ABOVE_ZERO, BELOW_ZERO = (math.ulp(0.0), math.inf), (-math.inf, -math.ulp(0.0))
CLAIMS = (
    Claim("Figures 1, B.1: logistic regression is at chance (within 0.1 of 0.5)", (f"LR, {UNSEEN}",), (0.4, 0.6)),
    Claim(
        "Figures 1, B.1: with 2 or 3 linear layers accuracy is nearly perfect (at least 0.9)",
        tuple(f"{name}, {UNSEEN}" for name in LINNETS),
        (0.9, 1.0),
    ),
    Claim(
        "Figures 1, B.1: linear layers make meta-learning better (difference above 0)",
        tuple((f"{name}, {UNSEEN}", f"LR, {UNSEEN}") for name in LINNETS),
        ABOVE_ZERO,
    ),
    Claim(
        "Figure B.3: collapsing before adaptation makes it worse (difference below 0)",
        tuple((f"{name}, {COLLAPSED}", f"{name}, {UNSEEN}") for name in LINNETS),
        BELOW_ZERO,
    ),
    Claim(
        "B.4: collapsed before adaptation, LinNet is as logistic regression (difference within 0.05)",
        tuple((f"{name}, {COLLAPSED}", f"LR, {UNSEEN}") for name in LINNETS),
        (-0.05, 0.05),
    ),
    Claim(
        "B.4: training and unseen tasks differ very little (difference within 0.02)",
        tuple((f"{name}, {TRAINING}", f"{name}, {UNSEEN}") for name in MODELS),
        (-0.02, 0.02),
    ),
)


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Decide each claim of the paper in each panel.

    A claim is reproduced if both intervals, over tasks and over seeds, of all its values lie in its range, and reversed
    if all lie outside; otherwise, and with a single seed, it is undecided.

    Args:
        result: the result of `logistic`.

    Returns:
        For each: claim, labels, support, metric, verdict, and `ours`, the numbers with both intervals.
    """
    return [
        {
            "claim": claim.text,
            **{key: panel[key] for key in ("labels", "support", "metric")},
            "verdict": _verdict(panel, claim),
            "ours": "; ".join(f"{name}: {_number(panel, name)}" for name in map(_name, claim.of)),
        }
        for panel in result["panels"]
        for claim in CLAIMS
    ]


def _name(of: str | tuple[str, str]) -> str:
    return of if isinstance(of, str) else " - ".join(of)


def _found(panel: dict[str, Any], name: str) -> tuple[float, float, float | None]:
    """The mean at the end, and the half widths over tasks and over seeds."""
    curve = panel["curves"].get(name)
    value = curve or panel["differences"][name]
    return curve["mean"][-1] if curve else value["mean"], value["over_tasks"], value["over_seeds"]


def _number(panel: dict[str, Any], name: str) -> str:
    mean, tasks, seeds = _found(panel, name)
    over_seeds = "a single seed" if seeds is None else f"± {seeds:.3f} over seeds"
    return f"{mean:.3f} (± {tasks:.3f} over tasks, {over_seeds})"


def _verdict(panel: dict[str, Any], claim: Claim) -> str:
    intervals = []
    for mean, *halves in (_found(panel, _name(of)) for of in claim.of):
        if None in halves:
            return UNDECIDED
        intervals += [(mean - half, mean + half) for half in halves if half is not None]
    return verdict(intervals, claim.claimed)
