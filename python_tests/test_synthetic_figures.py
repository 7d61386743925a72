"""The experiment on binary logistic tasks: steps, metrics and collapsing by hand; verdicts of claims; drawings."""

from __future__ import annotations

import copy
import json
import math
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from experiments import synthetic, synthetic_figures
from experiments.collapse import collapsed, collapsed_scores
from experiments.intervals import half_width, verdict
from experiments.synthetic import MODELS, UNSEEN, accuracies, claims, first_tasks, logistic, make_learner
from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import LinNet, logistic_regression, softmax_regression
from kfo_ext.runs import RunFolder
from kfo_ext.tasks import TaskBatch, make_family
from kfo_ext.trainer import Config, Trainer, evaluate, load_learner
from kfo_ext.updates import GradientDescent

every_model = pytest.mark.parametrize("model", MODELS)


def weights_of(learner: MAML) -> list[Tensor]:
    return [W.detach().double().requires_grad_() for W in learner.model.parameters()]


def logits_by_hand(weights: list[Tensor], x: Tensor) -> Tensor:
    """a^T B x, or with more or fewer layers; x (n, 2)."""
    for W in weights:
        x = x @ W.mT
    return x[:, 0]


def step_by_hand(weights: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """One step of rate 0.9 down the mean of log(1 + exp(-z)) for y = 1 and log(1 + exp(z)) for y = 0."""
    z = logits_by_hand(weights, x)
    loss = torch.log(1 + torch.exp(-(2 * y[:, 0] - 1) * z)).mean()
    return [W - 0.9 * g for W, g in zip(weights, torch.autograd.grad(loss, weights, create_graph=True))]


def test_one_task_by_hand_in_each_way():
    """Each model on a task of each kind of labels: the step, both metrics, and the MAML's own metric."""
    for model in MODELS:
        for labels in ("separable", "bernoulli"):
            learner = make_learner(model, seed=3).double()
            task = make_family("logistic", "test", shots=7, queries=9, labels=labels).sample(5, 1)
            task = task.to(dtype=torch.float64)
            (x, y), (qx, qy) = ((part.x[0], part.y[0]) for part in task)
            weights = step_by_hand(weights_of(learner), x, y)
            torch.testing.assert_close(
                list(learner.adapt(task.support).parameters.values()), [W[None] for W in weights], rtol=1e-12, atol=0
            )
            right = chance_right = 0.0
            for z, target in zip(logits_by_hand(weights, qx).tolist(), qy[:, 0].tolist()):
                p = 1 / (1 + math.exp(-z))
                right += (z > 0) == (target == 1)
                chance_right += p if target == 1 else 1 - p
            found = accuracies(learner, task)
            assert found["sign"].item() == pytest.approx(right / 9, abs=1e-12), (model, labels)
            assert found["sampled"].item() == pytest.approx(chance_right / 9, abs=1e-12), (model, labels)
            metrics = learner(task).metrics
            assert metrics is not None and metrics.item() == pytest.approx(right / 9, abs=1e-12)


def test_accuracies_of_many_tasks_are_those_of_each():
    learner = make_learner("LinNet(3)", seed=0)
    batch = make_family("logistic", "test", shots=4, queries=6).sample(0, 5)
    alone = [accuracies(learner, task) for task in batch.split(1)]
    for metric, values in accuracies(learner, batch).items():
        assert values.shape == (5,)
        torch.testing.assert_close(values, torch.cat([each[metric] for each in alone]))


def test_sampled_accuracy_is_the_mean_over_draws():
    learner = make_learner("LinNet(2)", seed=1)
    batch = make_family("logistic", "test", shots=10, queries=10).sample(0, 3)
    with torch.no_grad():
        p = learner.adapt(batch.support).predict(batch.query.x).sigmoid()
    drawn = (torch.bernoulli(p.expand(20_000, *p.shape)) == batch.query.y).double().mean((0, 2, 3))
    # Five standard deviations of the mean of 200,000 draws.
    torch.testing.assert_close(accuracies(learner, batch)["sampled"], drawn, atol=5 * 0.5 / 200_000**0.5, rtol=0)


@every_model
def test_meta_training_by_hand(model):
    """Three meta-iterations of SGD at the rates of table D.5."""
    history = synthetic._run(model, "separable", 10, seed=2, points=[0, 3], tasks=40)
    learner = make_learner(model, seed=2)
    training = make_family("logistic", "train", seed=2, shots=10, queries=synthetic.QUERIES)
    weights = weights_of(learner)
    for iteration in range(3):
        batch = training.sample(iteration, 32).to(dtype=torch.float64)
        losses = []
        for x, y, qx, qy in zip(*batch.support, *batch.query):
            z = logits_by_hand(step_by_hand(weights, x, y), qx)
            losses.append(binary_cross_entropy_with_logits(z, qy[:, 0]))
        rate = {"LR": 0.01, "LinNet(2)": 0.1, "LinNet(3)": 0.1}[model]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), weights)
        weights = [(W - rate * g).detach().requires_grad_() for W, g in zip(weights, gradients)]
    with torch.no_grad():
        for own, W in zip(learner.model.parameters(), weights):
            own.copy_(W)
    unseen = make_family("logistic", "test", seed=0, shots=10, queries=synthetic.QUERIES).sample(0, 40)
    for part, tasks in {UNSEEN: unseen, synthetic.TRAINING: first_tasks(training, 40)}.items():
        expected = accuracies(learner, tasks)["sampled"]
        torch.testing.assert_close(history[part, "sampled"][1], expected, rtol=0, atol=1e-5)
        assert not torch.allclose(history[part, "sampled"][0], expected, atol=1e-4)


def test_first_tasks_are_those_of_the_stream():
    family = make_family("logistic", "train", shots=3, queries=2)
    first = first_tasks(family, 40)
    assert [len(X) for part in first for X in part] == [40] * 4
    second = family.sample(1, 32)
    assert torch.equal(first.query.x[32:], second.query.x[:8]) and torch.equal(
        first.support.y[32:], second.support.y[:8]
    )


def stack(seed: int, **options) -> tuple[MAML, TaskBatch]:
    """A LinNet with biases, of random weights, and tasks for it, in float64."""
    torch.manual_seed(seed)
    network = LinNet(softmax_regression(5, 3), [4, 6]).double()
    for X in network.parameters():
        nn.init.normal_(X, std=0.5)
    x, y = torch.randn(2, 4, 9, 5, dtype=torch.float64), torch.randint(3, (2, 4, 9))
    batch = TaskBatch.of(list(zip(x[0], y[0])), list(zip(x[1], y[1])))
    return MAML(network, **{"lr": 0.3, "steps": 2, **options}), batch


def test_collapsing_after_adaptation_changes_nothing_and_before_does():
    learner, batch = stack(0)
    with torch.no_grad():
        adapted = learner.adapt(batch.support)
        as_it_is = adapted.predict(batch.query.x)
        after = torch.stack([adapted.module(i).collapse()(x) for i, x in enumerate(batch.query.x)])
        before = collapsed(learner).adapt(batch.support).predict(batch.query.x)
        unadapted = collapsed(learner).adapt(batch.support, steps=0).predict(batch.query.x)
    torch.testing.assert_close(after, as_it_is, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, as_it_is, atol=1e-2)
    torch.testing.assert_close(unadapted, learner.adapt(batch.support, steps=0).predict(batch.query.x))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_collapsed_learner_is_plain_softmax_regression(steps):
    learner, batch = stack(1, steps=max(steps, 1))
    learner.steps = steps
    first, second, third = ((layer.weight.detach(), layer.bias.detach()) for layer in learner.model.head)
    W = third[0] @ second[0] @ first[0]
    b = third[0] @ (second[0] @ first[1] + second[1]) + third[1]
    result = collapsed(learner)(batch)
    for i, (x, y, qx, qy) in enumerate(zip(*batch.support, *batch.query)):
        theta = [W.clone().requires_grad_(), b.clone().requires_grad_()]
        for _ in range(steps):
            loss = nn.functional.cross_entropy(x @ theta[0].mT + theta[1], y)
            theta = [X - 0.3 * g for X, g in zip(theta, torch.autograd.grad(loss, theta, create_graph=True))]
        outputs = qx @ theta[0].mT + theta[1]
        torch.testing.assert_close(result.query_losses[i], nn.functional.cross_entropy(outputs, qy).detach())
        assert result.metrics[i].item() == pytest.approx((outputs.argmax(1) == qy).double().mean().item())


def test_collapsed_scores_of_a_run(tmp_path):
    """A run of the trainer, loaded again: scores of the same tasks in the same order as those of `evaluate`."""
    config = Config(
        dataset="glyphs", network="linear", method="linnet", widths="8,8", update="none", inner_lr=0.1, steps=1,
        iterations=2, meta_batch=2, validation_tasks=2,
    )  # fmt: skip
    Trainer.start(config, tmp_path / "run").fit()
    _, learner, _ = load_learner(RunFolder.open(tmp_path / "run"), "last")
    family = make_family("glyphs", "test", shots=5, queries=5)
    scores = collapsed_scores(learner, family, 20)
    by_hand = MAML(learner.model.collapse(), lr=0.1, steps=1)
    expected = [by_hand(family.sample(i, 1)).metrics.item() for i in range(20)]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores != pytest.approx(evaluate(learner, family, tasks=20).scores.tolist(), abs=1e-6)


REFUSED = {
    "of one layer": (lambda: MAML(logistic_regression(), lr=0.1, steps=1), TypeError, "collapses, got one of Linear"),
    "ANIL": (lambda: ANIL(LinNet(softmax_regression(4)), lr=0.1, steps=1), TypeError, "expected a MAML.*got ANIL"),
    "KFO": (lambda: learned(KFO), ValueError, "gradient descent, got a learned update.*KFO"),
    "rates": (lambda: learned(lambda p: GradientDescent(p, per_step=1)), ValueError, "gradient descent, got a learned"),
    "in part": (
        lambda: MAML(LinNet(softmax_regression(4)), adapted=["model.head.0.*"], lr=0.1, steps=1),
        ValueError,
        "expected all of model.head.0.weight",
    ),
}  # fmt: skip


def learned(update) -> MAML:
    network = LinNet(softmax_regression(4))
    return MAML(network, update=update(network.named_parameters()), lr=0.1, steps=1)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_collapse_is_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        collapsed(make())


@pytest.fixture(scope="module")
def result():
    return logistic([0, 5], 3, 64)


def test_summary_follows_from_the_arguments_alone(result):
    assert json.loads(json.dumps(result)) == result
    other = logistic([5], 3, 64)
    assert result["iterations"] == [0, 1, 2, 3] and len(result["panels"]) == 8
    for panel, alone in zip(result["panels"], other["panels"]):
        assert len(panel["curves"]) == 8 and all(len(curve["mean"]) == 4 for curve in panel["curves"].values())
        for kind in ("curves", "differences"):
            for name, value in panel[kind].items():
                assert value["seeds"][1] == alone[kind][name]["seeds"][0]
                end = value["mean"][-1] if kind == "curves" else value["mean"]
                assert end == pytest.approx(sum(value["seeds"]) / 2, abs=2e-6)
                # Student's t of one degree of freedom, of two values.
                apart = abs(value["seeds"][0] - value["seeds"][1])
                assert value["over_seeds"] == pytest.approx(12.7062 * apart / 2, rel=1e-2, abs=2e-5)
                assert alone[kind][name]["over_seeds"] is None and value["over_tasks"] > 0
        for name, value in panel["differences"].items():
            a, b = (panel["curves"][part]["mean"][-1] for part in name.split(" - "))
            assert value["mean"] == pytest.approx(a - b, abs=3e-6)


def test_curves_are_thin_and_end_at_the_end(monkeypatch):
    monkeypatch.setattr(synthetic, "MODELS", {"LR": MODELS["LR"]})
    monkeypatch.setattr(synthetic, "BEST", {"separable": 1.0})
    monkeypatch.setattr(synthetic, "SUPPORTS", (10,))
    monkeypatch.setattr(synthetic, "CLAIMS", ())
    thin = logistic([0], 47, 8)
    assert thin["iterations"][0] == 0 and thin["iterations"][-1] == 47 and 2 < len(thin["iterations"]) <= 100
    assert all(len(c["mean"]) == len(thin["iterations"]) for p in thin["panels"] for c in p["curves"].values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 2, 10), ValueError, "seeds: expected at least one"),
        (([0, 0], 2, 10), ValueError, r"seeds: .* each once, got \[0, 0\]"),
        (([-1], 2, 10), ValueError, "seeds"),
        (([0], 0, 10), ValueError, "iterations"),
        (([0], 2, 1), ValueError, "tasks"),
        (([0], 2, 65), ValueError, "at most the 64 that 2 iterations train on, got 65"),
        (([0], 2.0, 10), TypeError, "iterations"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        logistic(*arguments)


def test_half_width_is_students():
    for n, t in ((2, 12.7062), (3, 4.30265), (11, 2.22814), (1001, 1.96234)):
        values = torch.arange(n, dtype=torch.float64)
        assert half_width(values) == pytest.approx(t * values.std().item() / math.sqrt(n), rel=1e-5)
    assert half_width(torch.ones(1)) is None
    assert half_width(torch.ones(3)) == 0
    for bad in (torch.ones(0), torch.ones(2, 2), torch.tensor([1.0, torch.nan])):
        with pytest.raises(ValueError, match="values: expected finite numbers"):
            half_width(bad)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0.4, 0.6)], "reproduced"),
        ([(0.45, 0.5), (0.4, 0.45)], "reproduced"),
        ([(0.7, 0.8), (0.1, 0.39)], "reversed"),
        ([(0.5, 0.61)], "undecided"),
        ([(0.3, 0.7)], "undecided"),
        ([(0.5, 0.5), (0.7, 0.8)], "undecided"),
        ([], "undecided"),
    ],
)
def test_verdict_of_intervals(intervals, expected):
    if intervals:
        assert verdict(intervals, (0.4, 0.6)) == expected


def made_up(result, means: dict[str, float], tasks: float = 0.004, seeds: float | None = 0.003) -> dict[str, list]:
    """The claims of the first panel with other numbers of its own: verdicts and texts in the order of the claims."""
    result = copy.deepcopy(result)
    panel = result["panels"][0]
    for name, curve in panel["curves"].items():
        curve |= {"mean": [0.0, means[name]], "over_tasks": tasks, "over_seeds": seeds}
    for name, value in panel["differences"].items():
        a, b = name.split(" - ")
        value |= {"mean": means[a] - means[b], "over_tasks": tasks, "over_seeds": seeds}
    found = claims(result)[: len(synthetic.CLAIMS)]
    return {key: [each[key] for each in found] for key in ("verdict", "ours")}


def means_of(lr: float, linnet: float, collapsed_first: float, training: float = 0.0) -> dict[str, float]:
    return {
        "LR, training tasks": lr + training,
        "LR, unseen tasks": lr,
        **{f"LinNet({n}), training tasks": linnet + training for n in (2, 3)},
        **{f"LinNet({n}), unseen tasks": linnet for n in (2, 3)},
        **{f"LinNet({n}), collapsed first, unseen tasks": collapsed_first for n in (2, 3)},
    }


def test_claims_on_numbers_as_published(result):
    assert made_up(result, means_of(0.51, 0.97, 0.52))["verdict"] == ["reproduced"] * 6


def test_claims_on_the_opposite(result):
    found = made_up(result, means_of(0.95, 0.85, 0.88, training=0.04))
    assert found["verdict"] == ["reversed"] * 6
    assert found["ours"][0] == "LR, unseen tasks: 0.950 (± 0.004 over tasks, ± 0.003 over seeds)"
    assert found["ours"][3].count("; ") == 1 and "0.030" in found["ours"][3]


def test_claims_that_an_interval_leaves_open(result):
    published = means_of(0.51, 0.97, 0.52)
    for wide in ({"tasks": 0.6}, {"seeds": 0.6}):
        assert made_up(result, published, **wide)["verdict"] == ["undecided"] * 6
    assert made_up(result, published, seeds=None)["verdict"] == ["undecided"] * 6
    assert "a single seed" in made_up(result, published, seeds=None)["ours"][0]
    # No difference at all is neither better nor worse.
    same = made_up(result, means_of(0.5, 0.5, 0.5), tasks=0.0, seeds=0.0)["verdict"]
    assert same == ["reproduced", "reversed", "reversed", "reversed", "reproduced", "reproduced"]
    # One of the two LinNets is not enough.
    assert made_up(result, {**published, "LinNet(3), unseen tasks": 0.7})["verdict"][1] == "undecided"


def test_every_claim_of_a_result(result):
    found = claims(result)
    assert len(found) == 8 * 6 and {each["verdict"] for each in found} <= {"reproduced", "reversed", "undecided"}
    assert len({(each["claim"], each["labels"], each["support"], each["metric"]) for each in found}) == 48


def test_best_accuracy_of_drawn_labels():
    """The Bayes classifier knows theta: right with probability sigma(|theta^T x|)."""
    theta, x = torch.randn(2, 400_000, 2, dtype=torch.float64)
    assert (theta * x).sum(1).abs().sigmoid().mean().item() == pytest.approx(synthetic.BEST["bernoulli"], abs=1e-3)


def test_drawings_are_equal_to_the_byte_and_hold_every_curve(result):
    drawn = synthetic_figures.drawings(result)
    assert len(drawn) == 6
    for name, picture in drawn.items():
        text = "".join(ElementTree.fromstring(picture).itertext())
        for word in ("accuracy on queries (%)", "meta-iterations, 32 tasks each", "support 10", "support 100", *MODELS):
            assert word in text, (name, word)
        assert ("collapsed first" in text) == ("b3" in name)
        assert b"<dc:date>" not in picture
    again = json.loads(json.dumps(result))
    with matplotlib.rc_context({"lines.linewidth": 7, "font.size": 20, "svg.hashsalt": None}):
        assert synthetic_figures.figure_b3(again, "separable") == drawn["figure-b3-separable.svg"]
    curves = again["panels"][0]["curves"]
    curves[f"LR, {UNSEEN}"]["mean"][1] += 0.1
    assert synthetic_figures.figure_1_right(again, "separable") != drawn["figure-1-right-separable.svg"]
    assert synthetic_figures.figure_1_right(again, "bernoulli") == drawn["figure-1-right-bernoulli.svg"]


def test_styles_differ_without_colours():
    styles = synthetic_figures.STYLES.values()
    assert len({(each["linestyle"], each["marker"], each.get("markerfacecolor")) for each in styles}) == len(styles)
