"""learn2learn's GBML and MAML: the same calls, our update, and one backward pass per adapted step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from kfo_ext.packing import Packing
from kfo_ext.updates import GradientDescent, Update
from kfo_ext.updates.gradients import gradients

from .modules import cloned, replace_parameters
from .parameter_update import ParameterUpdate

Learner = TypeVar("Learner", bound="GBML")


class GBML(nn.Module):
    """Gradient-based meta-learning in a custom loop: `learner = gbml.clone(); learner.adapt(loss)`.

    It is learn2learn's GBML. With `adapt_transform`, one backward pass computes the gradients of the parameters and of
    the transform; learn2learn needs two.

    Args:
        module: the network.
        transform: as for `ParameterUpdate`.
        lr: the inner learning rate.
        adapt_transform: adapt the transform too, from a clone's second step on.
        first_order: treat gradients as constants; not with `adapt_transform`.
        allow_unused: leave parameters unchanged that the loss does not depend on, instead of raising.
        allow_nograd: leave parameters unchanged that do not require a gradient, instead of raising.
        compute_update: an `Update` or our `ParameterUpdate` of the module's parameters, instead of `transform`.

    Raises:
        TypeError: `compute_update` is another object, such as learn2learn's own `ParameterUpdate`.
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None] | None,
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        *,
        compute_update: Update | ParameterUpdate | None = None,
    ) -> None:
        super().__init__()
        if compute_update is None:
            compute_update = ParameterUpdate(module.named_parameters(), transform)
        if not isinstance(compute_update, (Update, ParameterUpdate)):
            raise TypeError(
                "compute_update: expected an Update such as KFO(module.named_parameters()), or the ParameterUpdate of "
                f"kfo_ext.interop.learn2learn, got {type(compute_update).__module__}.{type(compute_update).__name__}"
            )
        self.module = module
        self.transform = transform
        self.compute_update = compute_update
        self.lr = lr
        self.adapt_transform = adapt_transform
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        # The inner steps of this clone.
        self._steps = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def clone(
        self: Learner,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> Learner:
        """A copy to adapt, whose gradients reach this learner's parameters; None keeps a setting."""
        copy = cloned(self)
        copy._steps = 0
        settings = {
            "first_order": first_order,
            "allow_unused": allow_unused,
            "allow_nograd": allow_nograd,
            "adapt_transform": adapt_transform,
        }
        copy.__dict__.update({name: value for name, value in settings.items() if value is not None})
        return copy

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """Take one inner step.

        Args:
            loss: a scalar with a graph.
            first_order: treat gradients as constants; None uses the learner's setting, as below.
            allow_nograd: leave parameters unchanged that do not require a gradient.
            allow_unused: leave parameters unchanged that the loss does not depend on.

        Raises:
            ValueError: `first_order` is set with `adapt_transform`, a parameter is frozen or unused without its flag,
                or the loss is no scalar or has no graph.
        """
        first_order = self.first_order if first_order is None else first_order
        if first_order and self.adapt_transform:
            raise ValueError(
                "first_order: expected False with adapt_transform, since the transform is adapted through the graph of "
                "the last step, got True: use kfo_ext.MAML(module, update=..., adapt_update=True, first_order=True)"
            )
        places = [("module", self.module.named_parameters())]
        if self.adapt_transform and self._steps:
            learned = [(name, X) for name, X in self.compute_update.named_parameters() if X.requires_grad]
            places.append(("compute_update", iter(learned)))
        named = [(f"{place}.{name}", X) for place, found in places for name, X in found]
        grads = gradients(
            loss,
            [X for _, X in named],
            Packing.of(named),
            create_graph=not first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        parameters = list(self.module.parameters())
        own = iter(grads[len(parameters) :])
        if len(grads) > len(parameters):
            rows = list(self.compute_update.parameters())
            replace_parameters(
                self.compute_update, [self._moved(X, next(own)) if X.requires_grad else None for X in rows]
            )
        step = self._steps if self.compute_update.steps is not None else None
        updates = self.compute_update.transform(grads[: len(parameters)], step)
        replace_parameters(self.module, [self._moved(X, U) for X, U in zip(parameters, updates, strict=True)])
        self._steps += 1

    def _moved(self, X: Tensor, U: Tensor | None) -> Tensor | None:
        return None if U is None else X - self.lr * U


class MAML(GBML):
    """learn2learn's MAML: plain gradient descent in the inner loop. Attributes that it lacks are read from the model.

    Args:
        model: the network.
        lr: the inner learning rate.
        first_order: as for `GBML`.
        allow_unused: as for `GBML`; None uses the value of `allow_nograd`.
        allow_nograd: as for `GBML`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(
            model,
            None,
            lr,
            first_order=first_order,
            allow_unused=allow_nograd if allow_unused is None else allow_unused,
            allow_nograd=allow_nograd,
            compute_update=GradientDescent(model.named_parameters()),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)
