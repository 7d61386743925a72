"""The route that a learner will take, before it computes anything."""

from __future__ import annotations

from kfo_ext.tasks import TaskBatch

from .learner import MAML


def planned_route(learner: MAML, batch: TaskBatch) -> str:
    """Find the route of such batches by a forward of one task that leaves no trace.

    Args:
        learner: any learner; of ANIL, the route is that of the features.
        batch: one task at least.

    Returns:
        What `learner.route` will be.

    Raises:
        Exception: what the model's forward raises.
    """
    parameters, theta = learner._start(batch.support.y)
    learner._at_once(parameters, theta, batch)
    return learner.route
