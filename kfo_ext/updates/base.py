"""The base class of learned updates, which a learner or a hand-written loop calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, cast, overload

from torch import Tensor, nn

from kfo_ext.ops.own_code import own_code
from kfo_ext.packing import Packing, listed
from kfo_ext.updates import state
from kfo_ext.updates.checks import check_like, check_rule, check_step
from kfo_ext.updates.gradients import gradients
from kfo_ext.updates.step import StepState, taken

# Packed meta-parameters, (1, n) each.
Phi = tuple[Tensor, ...]


class Update(nn.Module, ABC):
    """U(g): turns gradients into updates by meta-parameters phi, which may be meta-learned and adapted per task.

    A subclass defines `phi` and `rule`; `MAML(model, update=...)` takes it. It should start as plain gradient descent,
    U(g) = g, and must treat each task's row independently.

    An update whose inner steps differ sets `steps`, their number, and defines `rule(phi, G, step=None)`: the inner loop
    passes the number of the step, 0 for the first.

    Its state_dict records what the meta-parameters were made for (`_extra_state`, a tensor of bytes): names, shapes and
    `options()`. It loads only into an update made for the same. Meta-parameters alone load with strict=False; then only
    their sizes are checked, and the caller answers for the rest.

    Args:
        parameters: the tensors that it updates, or (name, tensor) pairs such as `model.named_parameters()`; or their
            packing.
    """

    # The number of inner steps that have their own meta-parameters; None if all steps share them.
    steps: int | None = None

    def __init__(self, parameters: Iterable[Tensor | tuple[str, Tensor]] | Packing) -> None:
        super().__init__()
        self.packing = parameters if isinstance(parameters, Packing) else Packing.of(parameters)

    @property
    @abstractmethod
    def phi(self) -> Phi:
        """All meta-parameters, packed (1, n_i) each; () learns nothing."""

    @abstractmethod
    def rule(self, phi: Phi, G: Tensor) -> Tensor:
        """Compute U(g) as a pure function of packed tensors, differentiable by both; phi must not be read from self.

        Args:
            phi: as `self.phi`, with (tasks or 1, n_i) rows.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.
        """

    def rule_at(self, phi: Phi, G: Tensor, step: int | None) -> Tensor:
        """Compute `rule` in a given inner step, with its result checked.

        Args:
            phi: as for `rule`.
            G: as for `rule`.
            step: 0 for the first; None only if all steps are alike.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: this update has no meta-parameters for the step, or the rule's result has another shape than G,
                which torch would broadcast.
            TypeError: the rule's result is not a tensor.
        """
        if self.steps is None:
            U = self.rule(phi, G)
        else:
            check_step(step, self.steps)
            U = cast(Any, self).rule(phi, G, step=step)
        check_rule(type(self).__name__, U, G)
        return U

    def options(self) -> dict[str, Any]:
        """What the meta-parameters were made for besides names and shapes: JSON values, by name."""
        return {}

    @overload
    def transform(self, grads: Mapping[str, Tensor | None], step: int | None = None) -> dict[str, Tensor | None]: ...

    @overload
    def transform(self, grads: Iterable[Tensor | None], step: int | None = None) -> list[Tensor | None]: ...

    @own_code
    def transform(
        self, grads: Mapping[str, Tensor | None] | Iterable[Tensor | None], step: int | None = None
    ) -> dict[str, Tensor | None] | list[Tensor | None]:
        """Compute the updates of gradients, one per parameter, None where the gradient is None.

        Args:
            grads: tensors of the parameters' shapes, or all of them with one leading task dimension: a list in the
                order given to the constructor, or a dict by name in any order.
            step: the inner step, as for `rule_at`.

        Returns:
            A list, or a dict in the order of the one given.

        Raises:
            ValueError: the number of gradients, a name, a shape, a task dimension or a device does not fit; a dict is
                given for parameters without names; or the step is invalid, as for `rule_at`.
            TypeError: a gradient has another dtype than the meta-parameters.
        """
        if isinstance(grads, Mapping):
            updates = self.transform(self.packing.in_order(grads, "grads"), step)
            return self.packing.by_name(updates, grads)
        grads = listed(grads, "grads")
        rows = self.packing.tasks(grads, "grads")
        present = next((grad for grad in grads if grad is not None), None)
        if present is None:
            return [None] * len(grads)
        check_like(self.phi, present, "grads")
        return self.transform_checked(grads, rows, step)

    def transform_checked(self, grads: list[Tensor | None], rows: int | None, step: int | None) -> list[Tensor | None]:
        """Compute `transform` of a list that is already checked.

        Args:
            grads: the gradients, in the packing's order.
            rows: the number of tasks, None without a task dimension.
            step: the inner step, as for `rule_at`.

        Returns:
            One update per gradient, None where the gradient is None.
        """
        packing = self.packing
        updates = packing.unpack(self.rule_at(self.phi, packing.join(grads, rows), step), batched=rows is not None)
        return [None if grad is None else update for grad, update in zip(grads, updates)]

    @overload
    def forward(
        self,
        loss: Tensor,
        parameters: Mapping[str, Tensor],
        create_graph: bool = False,
        retain_graph: bool | None = None,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        step: int | None = None,
    ) -> dict[str, Tensor | None]: ...

    @overload
    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool | None = None,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        step: int | None = None,
    ) -> list[Tensor | None]: ...

    @own_code
    def forward(
        self,
        loss: Tensor,
        parameters: Mapping[str, Tensor] | Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool | None = None,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        step: int | None = None,
    ) -> dict[str, Tensor | None] | list[Tensor | None]:
        """Differentiate `loss` by `parameters` and return their updates, None where there is no gradient.

        Args:
            loss: (), the loss.
            parameters: the tensors to update: a list in the order given to the constructor, or a dict by name in any
                order, such as dict(model.named_parameters()).
            create_graph: keep the graph of the gradients, for second-order meta-gradients.
            retain_graph: keep the loss's graph; as `create_graph` by default.
            allow_unused: parameters that the loss does not depend on get None.
            allow_nograd: parameters that do not require a gradient get None.
            step: the inner step, as for `rule_at`.

        Returns:
            A list, or a dict in the order of the one given.

        Raises:
            ValueError: the loss is not a scalar or has no graph; the number of parameters, a shape or a name does not
                fit; a dict is given for parameters without names; a parameter is frozen or unused without its flag; or
                the step is invalid, as for `rule_at`.
        """
        by_name = parameters if isinstance(parameters, Mapping) else None
        grads = gradients(
            loss,
            self.packing.in_order(parameters, "parameters") if isinstance(parameters, Mapping) else parameters,
            self.packing,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        updates = self.transform(grads, step)
        return updates if by_name is None else self.packing.by_name(updates, by_name)

    @overload
    def step(
        self,
        loss: Tensor | Mapping[str, Tensor | None] | Iterable[Tensor | None],
        params: Mapping[str, Tensor],
        state: StepState | None = None,
        *,
        lr: float,
        adapt_update: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
    ) -> tuple[dict[str, Tensor], StepState]: ...

    @overload
    def step(
        self,
        loss: Tensor | Mapping[str, Tensor | None] | Iterable[Tensor | None],
        params: Iterable[Tensor],
        state: StepState | None = None,
        *,
        lr: float,
        adapt_update: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
    ) -> tuple[list[Tensor], StepState]: ...

    @own_code
    def step(
        self,
        loss: Tensor | Mapping[str, Tensor | None] | Iterable[Tensor | None],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        state: StepState | None = None,
        *,
        lr: float,
        adapt_update: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
    ) -> tuple[dict[str, Tensor] | list[Tensor], StepState]:
        """Take one inner step of a hand-written loop: `params - lr * U(phi, grad of loss)`. Changes nothing in place.

            params, state = dict(model.named_parameters()), None
            for x, y in batches:
                loss = cross_entropy(functional_call(model, params, x), y)
                params, state = kfo.step(loss, params, state, lr=0.1, adapt_update=True)

        With `adapt_update` the meta-parameters phi are adapted too, from the second step on: phi minus lr times the
        gradient of the loss by phi, which costs no second backward pass (see `kfo_ext.updates.adaptation`). Everything
        is differentiable: a backward pass from the last params reaches the first ones and this update's own phi.

        Parameters with one leading task dimension, (tasks, *shape) each, belong to that many tasks. Each task takes its
        own step, and `loss` holds one loss per task, which depends on that task's parameters only.

        Under torch.func pass gradients instead of the loss; they may have, or be mapped over, a task dimension:

            grads = torch.func.grad(loss_of)(params, x, y)
            params, state = kfo.step(grads, params, state, lr=0.1)

        To differentiate by phi under torch.func, call a module that holds this update and whose forward is the loop:
        functional_call(module, {...}).

        An endless loop must cut its graph now and then: `params, state = state.detached(params)`.

        Args:
            loss: (), or (tasks,) with a task dimension; or gradients of the parameters, structured as `params`. The
                caller answers for gradients: they belong to a loss at `params` that depends on phi only through these.
            params: tensors of the parameters' shapes, or all of them with one leading task dimension: a list in the
                order given to the constructor, or a dict by name in any order.
            state: what the last step returned; None for the first one.
            lr: inner learning rate of params and of phi.
            adapt_update: adapt phi, except rows that are frozen (`requires_grad_(False)`).
            first_order: treat gradients as constants; phi keeps its gradient through U.
            allow_unused: leave parameters unchanged that the loss does not depend on.

        Returns:
            The parameters, a list or a dict in the order of the one given, and the state for the next step.

        Raises:
            ValueError: the gradient of phi would be wrong: lr or `adapt_update` differs from the last step, params are
                not those that the last step returned or were changed since, the loss depends on phi directly, or
                gradients are disabled. The state belongs to another update or transform. There are more steps than
                meta-parameters for them. The loss has no graph, has another shape, or does not depend on a parameter.
                Names, lengths or shapes do not fit.
            TypeError: an argument has another type, or another dtype than the meta-parameters.
        """
        return taken(self, loss, params, state, lr, adapt_update, first_order, allow_unused)

    def _made_for(self) -> dict[str, Any]:
        packing = self.packing
        shapes = [list(shape) for shape in packing.shapes]
        return {"update": type(self).__name__, "names": list(packing.names), "shapes": shapes, **self.options()}

    def get_extra_state(self) -> Tensor:
        """What the meta-parameters were made for, as stored in the state_dict: JSON, in a tensor of bytes."""
        return state.encode(self._made_for())

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: `check_state` has compared the state already."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        with state.explained():
            return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Checks every nested update before anything is copied, so that a refused state leaves the module unchanged.
        for name, module in self.named_modules():
            if isinstance(module, Update):
                module.check_state(state_dict, f"{prefix}{name}." if name else prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise ValueError if a state_dict, whose keys have the prefix, was made for other parameters or options."""
        key = prefix + "_extra_state"
        if key in state_dict:
            state.compare(self._made_for(), state.decode(state_dict[key], key), key)
        for name, parameter in (*self.named_parameters(), *self.named_buffers()):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"{prefix}{name}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)}: "
                    "these meta-parameters were made for other parameters"
                )
