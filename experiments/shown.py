"""Computed values in the report: Markdown, and its pictures by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import half, percent, picture, table
from .section4.pictures import draw_figure1_left, draw_figure2_left, draw_figure2_right
from .synthetic_figures import drawings

Value = Mapping[str, Any]
Shown = tuple[str, dict[str, bytes]]
ERRATA = "Section 4's formulas, each checked by machine, are in [the errata](errata.md)."


def regression(value: Value) -> Shown:
    """Figure 1, left."""
    settings, curves = value["settings"], value["curves"]
    rows = []
    for model, seeds in curves.items():
        ends = [curve["mse"][-1] for curve in seeds.values()]
        best = value["lines"][f"{model}, best"]
        rows.append((model, f"{sum(ends) / len(ends):.3f}", f"{min(ends):.3f} to {max(ends):.3f}", f"{best:.3f}"))
    caption = (
        f"Mean squared error after one inner step over meta-training, {len(settings['seeds'])} seeds, "
        f"{settings['tasks']} tasks in a meta-iteration, {settings['shots']} examples in a support set; dotted: the "
        "least error that the model can have over all tasks."
    )
    rows_shown = table(("model", "error at the end, mean over seeds", "range over seeds", "least error"), rows)
    text = f"{rows_shown}\n{picture('figure-1-left.svg', caption)}\n\n{ERRATA}"
    return text, {"figure-1-left.svg": draw_figure1_left(value)}


def landscape(value: Value) -> Shown:
    """Figure 2."""
    settings = value["settings"]
    ends = [(path["a"][-1], path["b"][-1]) for path in value["trajectories"]]
    apart = [min(max(abs(a - x), abs(b - y)) for x, y in value["solutions"]) for a, b in ends]
    captions = {
        "figure-2-left.svg": "The MAML loss of DEEP over its parameters a and b; stars are the four solutions.",
        "figure-2-right.svg": (
            f"Meta-training by gradient descent with momentum from {len(ends)} starts (dots), "
            f"{settings['iterations']} meta-iterations."
        ),
    }
    text = "\n\n".join(picture(name, caption) for name, caption in captions.items())
    end = f"Each trajectory ends within {max(apart):.4f} of a solution."
    drawn = {"figure-2-left.svg": draw_figure2_left(value), "figure-2-right.svg": draw_figure2_right(value)}
    return f"{text}\n\n{end}", drawn


def logistic(value: Value) -> Shown:
    """Figure 1, right, Figures B.1 and B.3, and the claim of appendix B.4."""
    settings = value["settings"]
    rows = [
        (each["claim"], each["labels"], str(each["support"]), each["metric"], each["verdict"], each["ours"])
        for each in value["claims"]
    ]
    head = (
        "Accuracy by the sign of the logit is the usual one. Sampled accuracy is that of predictions drawn from the "
        "sigmoid of the logit, as section 4.2 writes them. The ranges in brackets are ours."
    )
    verdicts = table(("claim", "labels", "support", "accuracy", "verdict", "ours"), rows)
    drawn = drawings(value)
    runs = f"accuracy over meta-training, {len(settings['seeds'])} seeds, {settings['tasks']} tasks"
    captions = {name: f"{_figure_of(name)}: {runs}." for name in drawn}
    return "\n\n".join([head, verdicts, *(picture(name, captions[name]) for name in drawn)]), drawn


def floors(value: Value) -> Shown:
    """Nearest class means and prototypical networks."""
    rows = [("nearest class mean of pixels", *_score(value["nearest_centroid"]))]
    rows += [(f"prototypical network, seed {each['seed']}", *_score(each)) for each in value["prototypical"]]
    return table(("model", "accuracy (%)", "over tasks"), rows), {}


def upper_line(value: Value) -> Shown:
    """Softmax regression on all images that classes can spare."""
    rows = [("softmax regression on all images of the classes", *_score(value), str(value["tasks"]))]
    return table(("model", "accuracy (%)", "over tasks", "test tasks"), rows), {}


def _score(value: Value) -> tuple[str, str]:
    return percent(value["mean"]), half(value["interval"])


def _figure_of(name: str) -> str:
    return name.removesuffix(".svg").replace("-", " ").capitalize()
