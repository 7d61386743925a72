"""ANIL: MAML that adapts the head alone, on features that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.tasks import TaskBatch
from kfo_ext.updates import Update

from .calls import exclusive
from .learner import MAML
from .losses import Loss
from .metric import Metric
from .plans import precision
from .routes import Route, tasks_at_once

# All parameters of a body are shared by the tasks: none is packed.
NONE = Packing((), ())


class ANIL(MAML):
    """MAML that adapts the head alone: the body's features are computed once per task and shared by all inner steps.

    One forward of the body computes support and query examples, so its batch statistics cover both, as in the
    reference. If the model's forward is head(features(x)), without batch statistics or ties between body and head,
    `MAML(model, adapted=["head.*"])` gives the same numbers, but computes the body in every step.

    Args:
        model: a module with a method or submodule `features(x)` and a submodule that is the head.
        head: the name of the head, such as "classifier" or "net.fc".
        update: one made for the head's parameters, such as `KFO(model.head.named_parameters())`, or None.

    The other arguments are as for `MAML`.

    Raises:
        TypeError: the model has no `features` or no such head; or as for `MAML`.
        ValueError: the head of this network cannot be adapted alone, as a TNet's; or as for `MAML`.

    Source:
        Raghu et al. 2020; paper, appendix B.5.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head: str = "head",
        update: Update | None = None,
        lr: float,
        steps: int,
        adapt_update: bool = False,
        first_order: bool = False,
        loss: Loss | None = None,
        metric: Metric | None = None,
        checkpoint: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        route: str = "auto",
        bf16: bool = False,
    ) -> None:
        if not isinstance(head, str) or not head:
            raise TypeError(f"head: expected the name of a submodule, got {head!r}")
        for each in model.modules() if isinstance(model, nn.Module) else ():
            # A class attribute of the network: see kfo_ext.networks.protocol.
            if isinstance(reason := getattr(type(each), "head_alone", None), str):
                raise ValueError(f"model: ANIL adapts the head alone, but {type(each).__name__} {reason}")
        # A property may give the head, too.
        found: Any = reduce(lambda owner, name: getattr(owner, name, None), head.split("."), cast(Any, model))
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        part = next((name for name, module in modules if name and module is found), None)
        if not callable(getattr(model, "features", None)) or part is None:
            children = ", ".join(name for name, _ in model.named_children()) if isinstance(model, nn.Module) else ""
            raise TypeError(
                f"model: expected a module with a method features(x) and a submodule named {head}, got "
                f"{type(model).__name__}{f' with {children}' if children else ''}; head= names another one"
            )
        self._label, self._part = head, part
        super().__init__(
            model,
            update=update,
            lr=lr,
            steps=steps,
            adapt_update=adapt_update,
            first_order=first_order,
            loss=loss,
            metric=metric,
            checkpoint=checkpoint,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
            route=route,
            bf16=bf16,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "model":
            # In a tuple, so that it is no submodule: its parameters are the model's.
            self._body = (_Body(value),)

    @property
    def part(self) -> str:
        """The name of the head."""
        return self._part

    def _at_once(self, parameters: Sequence[Tensor], theta: Tensor, batch: TaskBatch) -> int:
        # Only the shape counts: one task's examples stand for all.
        x = _together(batch.split(1)[0]).expand(len(batch.support.x), -1, *batch.support.x.shape[2:])
        return tasks_at_once(self._body_route(x), x, x.shape[1], self._row(theta))

    def _body_route(self, x: Tensor) -> Route:
        (body,) = self._body
        return self._plans.choose("body", body, NONE, (), _nothing(x), x)

    def features(self, x: Tensor) -> Tensor:
        """The features of examples (tasks, n, ...): (tasks, n, features)."""
        with exclusive():
            route = self._body_route(x)
            with precision(x, self.bf16):
                outputs = route.outputs(route.leaves(_nothing(x)), x)
        if not isinstance(outputs, Tensor):
            if not all(isinstance(output, Tensor) for output in outputs):
                raise TypeError(f"model: expected features(x) to return a tensor, got {type(outputs[0]).__name__}")
            outputs = torch.stack(outputs)
        return outputs.float() if self.bf16 else outputs

    def inputs(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The features of support and query examples, from one forward: (tasks, n, features) each."""
        support, query = self.features(_together(batch)).split([part.x.shape[1] for part in batch], 1)
        return support, query


class _Body(nn.Module):
    """The features of a model, as a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor) -> Any:
        return self.model.features(x)


def _together(batch: TaskBatch) -> Tensor:
    return torch.cat([batch.support.x, batch.query.x], 1)


def _nothing(x: Tensor) -> Tensor:
    """The packed parameters of a body, (tasks, 0)."""
    return x.new_zeros((len(x), 0), dtype=torch.float32)
