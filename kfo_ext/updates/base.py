"""The one base class of learned updates: what a learner, and a loop of one's own, call."""

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
    """U(g): turns gradients into updates, by meta-parameters phi that may be learned, and adapted per task.

    A subclass defines `phi` and `rule`; `MAML(model, update=...)` takes it. It should start as plain gradient descent,
    U(g) = g, and must treat each task's row by itself.

    One whose inner steps differ sets `steps`, their number, and defines `rule(phi, G, step=None)`: the inner loop says
    which step it is, 0 for the first.

    Its state_dict says what the meta-parameters were made for (`_extra_state`, a tensor of bytes): names, shapes and
    `options()`; it loads nowhere else. Meta-parameters alone load with strict=False: then their sizes are all that is
    checked, and the rest is the caller's word.

    Args:
        parameters: the tensors that it updates, or (name, tensor) pairs such as `model.named_parameters()`; or how
            they are packed.
    """

    # How many inner steps it has meta-parameters for; None where all steps share them.
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
        """U(g), a pure function of packed tensors, differentiable by both: of the phi that it is given, never of self.

        Args:
            phi: as `self.phi`, with (tasks or 1, n_i) rows.
            G: (tasks, n), packed gradients.

        Returns:
            (tasks, n), packed updates.
        """

    def rule_at(self, phi: Phi, G: Tensor, step: int | None) -> Tensor:
        """`rule` in an inner step, which an update whose steps are all alike need not know.

        Args:
            phi: as for `rule`.
            G: as for `rule`.
            step: 0 for the first; None only where all steps are alike.

        Raises:
            ValueError: a step that this update has no meta-parameters for; a rule that gives another shape than G's,
                which torch would broadcast.
            TypeError: a rule that gives no tensor.
        """
        if self.steps is None:
            U = self.rule(phi, G)
        else:
            check_step(step, self.steps)
            U = cast(Any, self).rule(phi, G, step=step)
        check_rule(type(self).__name__, U, G)
        return U

    def options(self) -> dict[str, Any]:
        """What else than names and shapes the meta-parameters were made for: values that JSON holds, by name."""
        return {}

    @overload
    def transform(self, grads: Mapping[str, Tensor | None], step: int | None = None) -> dict[str, Tensor | None]: ...

    @overload
    def transform(self, grads: Iterable[Tensor | None], step: int | None = None) -> list[Tensor | None]: ...

    @own_code
    def transform(
        self, grads: Mapping[str, Tensor | None] | Iterable[Tensor | None], step: int | None = None
    ) -> dict[str, Tensor | None] | list[Tensor | None]:
        """The updates of gradients, one per parameter, None where the gradient is None.

        Args:
            grads: tensors of the parameters' shapes, or all of them with one leading task dimension: a list in the
                order given to the constructor, or a dict by name in any order.
            step: the inner step, as for `rule_at`.

        Returns:
            A list, or a dict in the order of the one given.

        Raises:
            ValueError: another length, names that are missing or unknown, a dict for parameters without names; a shape,
                task dimension or device that does not fit; a step as for `rule_at`.
            TypeError: a dtype other than that of the meta-parameters.
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
        """`transform` of a list that has been checked; rows: its tasks, None without a task dimension."""
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
        """Differentiates `loss` by `parameters` and returns their updates, None where there is no gradient.

        Args:
            loss: (), the loss.
            parameters: the tensors to update: a list in the order given to the constructor, or a dict by name in any
                order, such as dict(model.named_parameters()).
            create_graph: keep the graph of the gradients, for second-order meta-gradients.
            retain_graph: keep the loss's graph; as `create_graph` by default.
            allow_unused: parameters the loss does not depend on get None.
            allow_nograd: parameters that do not require a gradient get None.
            step: the inner step, as for `rule_at`.

        Returns:
            A list, or a dict in the order of the one given.

        Raises:
            ValueError: a loss that is no scalar or has no graph; a list of another length or shapes; names that are
                missing or unknown, a dict for parameters without names; a frozen or unused parameter without its flag;
                a step as for `rule_at`.
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
        """One inner step of a loop of your own: `params - lr * U(phi, grad of loss)`. Changes nothing in place.

            params, state = dict(model.named_parameters()), None
            for x, y in batches:
                loss = cross_entropy(functional_call(model, params, x), y)
                params, state = kfo.step(loss, params, state, lr=0.1, adapt_update=True)

        With `adapt_update` the meta-parameters phi are adapted too, from the second step on: phi minus lr times the
        gradient of the loss by phi, which costs no second backward pass (see `kfo_ext.updates.adaptation`). All is
        differentiable: a backward pass from the last params reaches the first ones and this update's own phi.

        Parameters with one leading task dimension, (tasks, *shape) each, are of so many tasks: each takes a step of its
        own, and `loss` is one loss for each of them, of its parameters alone.

        Under torch.func pass gradients in place of the loss; they may have, or be mapped over, a task dimension:

            grads = torch.func.grad(loss_of)(params, x, y)
            params, state = kfo.step(grads, params, state, lr=0.1)

        A transform that differentiates by phi calls a module that holds this update, whose forward is the loop:
        functional_call(module, {...}).

        An endless loop cuts its graph now and then: `params, state = state.detached(params)`.

        Args:
            loss: (), or (tasks,) with a task dimension; or gradients of the parameters, as `params`, which the caller
                answers for: that they are of a loss at `params` that holds phi through these alone.
            params: tensors of the parameters' shapes, or all of them with one leading task dimension: a list in the
                order given to the constructor, or a dict by name in any order.
            state: what the last step returned; None for the first one.
            lr: of params, and of phi.
            adapt_update: adapt phi, but for rows that are frozen (`requires_grad_(False)`).
            first_order: gradients count as constants; phi keeps its gradient through U.
            allow_unused: parameters that the loss does not depend on stay as they are.

        Returns:
            The parameters, a list or a dict in the order of the one given, and the state of the next step.

        Raises:
            ValueError: what the gradient of phi does not allow: another lr or `adapt_update` than in the last step,
                params that the last step has not returned or that were changed since, a loss that holds phi itself,
                no graph to differentiate; a state of another update or transform; more steps than there are
                meta-parameters for; a loss without a graph, of another shape, or of a parameter that it does not depend
                on; names, lengths or shapes that do not fit.
            TypeError: an argument of another type, a dtype other than that of the meta-parameters.
        """
        return taken(self, loss, params, state, lr, adapt_update, first_order, allow_unused)

    def _made_for(self) -> dict[str, Any]:
        packing = self.packing
        shapes = [list(shape) for shape in packing.shapes]
        return {"update": type(self).__name__, "names": list(packing.names), "shapes": shapes, **self.options()}

    def get_extra_state(self) -> Tensor:
        """What the meta-parameters were made for, kept in the state_dict: JSON, as a tensor of bytes."""
        return state.encode(self._made_for())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: `check_state` has compared the state already."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        with state.explained():
            return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # All that it is made of before anything is copied, so that a refused state leaves the module as it was.
        for name, module in self.named_modules():
            if isinstance(module, Update):
                module.check_state(state_dict, f"{prefix}{name}." if name else prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raises ValueError for a state_dict, whose keys have the prefix, that was made for something else."""
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
