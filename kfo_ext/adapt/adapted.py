"""A model adapted to tasks: what it predicts, its parameters, and a module of its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .calls import exclusive, slots
from .selection import named_under

if TYPE_CHECKING:
    from .learner import MAML


class Adapted:
    """A model adapted to one task or to a batch of tasks, as `MAML.adapt` returns it.

    Its parameters and predictions are differentiable with respect to everything that is meta-learned, so any loss on
    them is a meta-loss; under torch.no_grad() they carry no graph. Parameters that are not adapted are read from the
    model at each call. As in plain torch, each forward of a batch norm in training updates its running statistics.

    Attributes:
        losses: (steps,) or (steps, tasks), the support loss before each step, detached.
    """

    def __init__(self, learner: MAML, theta: Tensor, losses: Tensor, single: bool) -> None:
        self._learner, self._theta, self._single = learner, theta, single
        self.losses = losses[:, 0] if single else losses

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The adapted parameters by name, as in `learner.adapted`: of their own shapes, or (tasks, *shape)."""
        packing = self._learner.packing
        return dict(zip(packing.names, packing.unpack(self._theta, batched=not self._single)))

    def predict(self, x: Tensor) -> Any:
        """The outputs of the adapted model. Batch norm takes the statistics of these examples.

        Args:
            x: (n, ...) for one task, (tasks, n, ...) for a batch.

        Returns:
            As the model returns them: (n, ...) for one task, (tasks, n, ...) or one output per task for a batch.

        Raises:
            ValueError: `x` holds another number of tasks, or the model's parameters changed after the learner was
                built.
            TypeError: `x` is not a tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if self._single:
            return self._learner.predict(self._theta, x[None])[0]
        if x.dim() < 2 or len(x) != len(self._theta):
            raise ValueError(f"x: expected ({len(self._theta)} tasks, examples, ...), got shape {tuple(x.shape)}")
        return self._learner.predict(self._theta, x)

    def module(self, task: int = 0) -> nn.Module:
        """A copy of the model with the adapted parameters of one task, to be used or saved by itself.

        Args:
            task: the index of the task, from 0.

        Returns:
            A module in training mode like the model; after eval() its batch norms use running statistics, which mix
            tasks.

        Raises:
            IndexError: there is no such task.
            ValueError: the model's parameters changed after the learner was built.
        """
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < len(self._theta):
            raise IndexError(f"task: expected 0 to {len(self._theta) - 1}, got {task}")
        learner = self._learner
        learner.current()
        with exclusive():
            # Tensors that a forward stored on modules, as hooks of torch's weight norm and pruning do, have a graph.
            left = [X for each in learner.model.modules() for X in vars(each).values() if isinstance(X, Tensor)]
            copied = copy.deepcopy(learner.model, {id(X): X.detach().clone() for X in left if not X.is_leaf})
        part, named = copied.get_submodule(learner.part), named_under(copied, learner.part)
        values = learner.packing.unpack(self._theta[task : task + 1].detach(), batched=False)
        for places, value in zip(slots(part, [named[name] for name in learner.adapted]), values):
            # A new parameter: a tie to another part of the model leaves that part unchanged.
            parameter = nn.Parameter(value.clone())
            for owner, own in places:
                owner.register_parameter(own, parameter)
        return copied
