"""A meta-trained LinNet whose stack is collapsed into one layer before it adapts (paper, appendix B.3)."""

from __future__ import annotations

from kfo_ext import MAML
from kfo_ext.tasks import TaskFamily
from kfo_ext.trainer import evaluate
from kfo_ext.updates import GradientDescent


def collapsed(learner: MAML) -> MAML:
    """Return a copy of a learner for the collapsed network, with the same rate, steps, loss and metric.

    Args:
        learner: learner of a network with `collapse()`, as `kfo_ext.networks.LinNet`, that adapts all parameters by
            gradient descent.

    Returns:
        The copy.

    Raises:
        TypeError: the learner is no MAML, such as ANIL, or its network has no `collapse()`.
        ValueError: the learner has a learned update, which belongs to the stack's parameters, or adapts only a part.
    """
    if type(learner) is not MAML:
        raise TypeError(f"learner: expected a MAML, which adapts the whole network, got {type(learner).__name__}")
    if not callable(collapse := getattr(learner.model, "collapse", None)):
        raise TypeError(
            f"learner: expected one of a LinNet, which collapses, got one of {type(learner.model).__name__}"
        )
    if type(learner.update) is not GradientDescent or learner.update.phi:
        raise ValueError(
            "learner: expected plain gradient descent, got a learned update, which belongs to the stack's parameters "
            f"and fits no other network: {type(learner.update).__name__}"
        )
    names = [name for name, _ in learner.model.named_parameters()]
    if set(learner.adapted) != set(names):
        raise ValueError(f"learner: expected all of {', '.join(names)} to adapt, got {', '.join(learner.adapted)}")
    copied = MAML(
        collapse(),
        lr=learner.lr,
        # The constructor requires a step; an evaluation may have none.
        steps=max(learner.steps, 1),
        first_order=learner.first_order,
        loss=learner.loss,
        metric=learner.metric,
        allow_unused=learner.allow_unused,
        bf16=learner.bf16,
    )
    copied.steps = learner.steps
    return copied


def collapsed_scores(learner: MAML, family: TaskFamily, tasks: int) -> list[float]:
    """Evaluate a learner whose network is collapsed before adaptation.

    Args:
        learner: a learner as `kfo_ext.trainer.load_learner` returns for a run with method linnet; see `collapsed`.
        family: the tasks of the split to evaluate on.
        tasks: number of tasks.

    Returns:
        The scores of `kfo_ext.trainer.evaluate`, in its order of tasks.
    """
    return evaluate(collapsed(learner), family, tasks=tasks).scores.tolist()
