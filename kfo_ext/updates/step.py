"""One inner step of a hand-written loop; `Update.step` is its interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfo_ext.ops.torch_private import functorch_level, in_functorch
from kfo_ext.packing import Packing, listed
from kfo_ext.updates.adaptation import Gradient, adapted, products, updated
from kfo_ext.updates.checks import check_adapted, check_fits, check_like, check_rate, check_step
from kfo_ext.updates.gradients import check_loss, differentiated
from kfo_ext.updates.moved import moved

if TYPE_CHECKING:
    from kfo_ext.updates.base import Phi, Update

Params = TypeVar("Params", bound=Mapping[str, Tensor] | Iterable[Tensor])


class Last(NamedTuple):
    """The last step of an update that is adapted.

    Attributes:
        phi: the meta-parameters that U was evaluated at, (tasks or 1, n) each.
        learned: which of phi are adapted.
        gradient: the gradient that U was evaluated at.
        pull: maps the next gradient to the VJP of U applied to it, by each of phi that is adapted.
        params: the parameters that the step returned, in the packing's order.
        versions: their version counters, which count in-place changes.
        level: the torch.func transform level at which the step was taken.
    """

    phi: Phi
    learned: tuple[bool, ...]
    gradient: Gradient
    pull: Callable[[Tensor], Iterable[Tensor]]
    params: tuple[Tensor, ...]
    versions: tuple[int, ...]
    level: int | None


class StepState(NamedTuple):
    """The state that a step returns for the next one, to be passed on unchanged.

    Attributes:
        update: the update that took the step.
        number: the number of steps taken.
        lr: the inner learning rate of the last step.
        last: what adapting phi requires; None if phi is not adapted.
    """

    update: Update
    number: int
    lr: float
    last: Last | None

    def detached(self, params: Params) -> tuple[Params, StepState]:
        """Cut the graph of the steps taken so far.

        The steps continue with the same numbers; a backward pass reaches the returned parameters, which are leaves, and
        no further. An adapted phi keeps its values but is detached from the update's own meta-parameters: start with
        state=None to use these again. If phi is adapted, U is evaluated once more.

        Args:
            params: the parameters that the last step returned.

        Returns:
            The parameters and the state, without the graph.

        Raises:
            ValueError: phi is adapted, and the params are not those that the last step returned, or were changed since.
        """
        packing, last = self.update.packing, self.last
        given = in_order(packing, params)
        leaves = [_leaf(param, param.requires_grad) for param in given]
        cut = cast("Params", packing.by_name(leaves, params) if isinstance(params, Mapping) else leaves)
        if last is None:
            return cut, self
        self.check(given, self.lr, adapt_update=True)
        phi = tuple(_leaf(row, learned) for row, learned in zip(last.phi, last.learned))
        gradient = (last.gradient[0].detach(), last.gradient[1])
        with torch.enable_grad():
            _, pull = evaluated(self.update, phi, last.learned, gradient, self.number - 1)
        kept = last._replace(phi=phi, gradient=gradient, pull=pull, params=tuple(leaves), versions=_versions(leaves))
        return cut, self._replace(last=kept)

    def check(self, params: list[Tensor], lr: float, adapt_update: bool) -> None:
        """Raise ValueError unless a step with these arguments may follow."""
        if adapt_update != (self.last is not None):
            raise ValueError(
                f"adapt_update: expected {not adapt_update} as in the last step, got {adapt_update}: begin anew with "
                "state=None"
            )
        if self.last is None:
            return
        if lr != self.lr:
            raise ValueError(
                f"lr: expected {self.lr} as in the last step, got {lr}: phi is adapted with one lr; begin anew with "
                "state=None, or learn rates (per_step, MetaSGD)"
            )
        if functorch_level() != self.last.level:
            raise ValueError(
                "state: expected one of a step in the same torch.func transform: begin with state=None inside the "
                "function that is transformed, and take all its steps there"
            )
        names = self.update.packing.names
        for name, param, other, version in zip(names, params, self.last.params, self.last.versions):
            if param is not other or param._version != version:
                what = "another tensor" if param is not other else "it was changed in place"
                raise ValueError(
                    f"params[{name!r}]: expected what the last step returned, as it was, got other values ({what}): "
                    "the gradient of an adapted phi holds where a step alone moves the parameters; pass them on as "
                    "they are, cut a graph with state.detached(params), or begin anew with state=None"
                )


def taken(
    update: Update,
    loss: Any,
    params: Params,
    state: StepState | None,
    lr: float,
    adapt_update: bool,
    first_order: bool,
    allow_unused: bool,
) -> tuple[Any, StepState]:
    """Take the inner step that `Update.step` documents.

    Args:
        update: as `self` there.
        loss: as there.
        params: as there.
        state: as there.
        lr: as there.
        adapt_update: as there.
        first_order: as there.
        allow_unused: as there.

    Returns:
        As `Update.step`.

    Raises:
        ValueError: as `Update.step`.
        TypeError: as `Update.step`.
    """
    packing, lr = update.packing, check_rate(lr)
    given = in_order(packing, params)
    tasks = packing.tasks(given, "params")
    for param in given[:1]:
        check_like(update.phi, param, "params")
        check_fits(lr, param.dtype)
    check_adapted(adapt_update, update)
    number = _number(update, state)
    if state is not None:
        state.check(given, lr, adapt_update)
    if adapt_update and not torch.is_grad_enabled():
        raise ValueError(
            "adapt_update: expected gradients to be enabled, since phi is adapted by one, got a call under no_grad; "
            "state.detached(params) cuts the graph instead"
        )
    last = None if state is None else state.last
    if isinstance(loss, (int, float)) or callable(loss):
        raise TypeError(
            f"loss: expected a tensor with a graph, or gradients, got {type(loss).__name__}: pass the loss itself, "
            "computed from params, not its .item() and not the function that computes it"
        )
    if isinstance(loss, Tensor):
        if last is not None:
            _check_direct(loss, given, (*last.phi, *(update.phi if number == 1 else ())))
        grads = _of_loss(packing, loss, given, tasks, first_order, allow_unused)
    else:
        grads = _given(packing, loss, given, tasks, first_order, allow_unused)
    gradient = _packed(packing, grads, tasks)
    if last is None:
        phi = update.phi
        if adapt_update:
            # Each task adapts its own copy of the meta-parameters, which an optimizer of the update does not move.
            phi = tuple(row.clone().expand(tasks or 1, -1) for row in phi)
        learned = tuple(adapt_update and _is_learned(row) for row in update.phi)
    else:
        learned = last.learned
        phi = adapted(last.phi, learned, last.pull(gradient[0]) if any(learned) else (), lr)
    U, pull = evaluated(update, phi, learned, gradient, number)
    after = moved(packing, given, U, lr, tasks)
    kept = None
    if adapt_update:
        kept = Last(phi, learned, gradient, pull, tuple(after), _versions(after), functorch_level())
    result = packing.by_name(after, params) if isinstance(params, Mapping) else after
    return result, StepState(update, number + 1, lr, kept)


def in_order(packing: Packing, params: Any) -> list[Tensor]:
    """The params as a list in the packing's order; raises TypeError or ValueError if they do not fit it."""
    given = packing.in_order(params, "params") if isinstance(params, Mapping) else listed(params, "params")
    for i, param in enumerate(given):
        if not isinstance(param, Tensor):
            pairs = ": pass dict(model.named_parameters())" if isinstance(param, tuple) else ""
            raise TypeError(f"params[{i}]: expected a tensor, got {type(param).__name__}{pairs}")
    return given


def evaluated(
    update: Update, phi: Phi, learned: tuple[bool, ...], gradient: Gradient, number: int
) -> tuple[Tensor, Callable[[Tensor], Iterable[Tensor]]]:
    """U of the gradient of step `number`, and its VJP by those of phi that are adapted."""
    mine = [row for row, is_learned in zip(phi, learned) if is_learned]
    if not mine or not in_functorch():
        U = updated(update, phi, gradient, number)
        return U, lambda G: products(update, mine, U, G, create_graph=True)

    # Tensors of an outer level have no graph in this one.
    def of(*rows: Tensor) -> Tensor:
        rest = iter(rows)
        mixed = tuple(next(rest) if is_learned else row for row, is_learned in zip(phi, learned))
        return updated(update, mixed, gradient, number)

    found: Any = torch.func.vjp(of, *mine)
    return found


def _number(update: Update, state: Any) -> int:
    """The number of this step; raises TypeError or ValueError if `state` does not belong to a step before it."""
    if state is not None and not isinstance(state, StepState):
        raise TypeError(f"state: expected what the last step returned, or None, got {type(state).__name__}")
    if state is not None and state.update is not update:
        raise ValueError(
            f"state: expected one of this {type(update).__name__}, got one of another update, a "
            f"{type(state.update).__name__}: each update has states of its own; begin with state=None"
        )
    number = 0 if state is None else state.number
    if update.steps is not None:
        check_step(number, update.steps)
    return number


def _of_loss(
    packing: Packing, loss: Tensor, params: list[Tensor], tasks: int | None, first_order: bool, allow_unused: bool
) -> list[Tensor | None]:
    if in_functorch():
        raise ValueError(
            "loss: expected gradients inside a torch.func transform, got a loss, which has no graph there: "
            "grads = torch.func.grad(loss_of)(params), then step(grads, params, ...)"
        )
    check_loss(loss, tasks)
    for name, param in zip(packing.names, params):
        if not param.requires_grad:
            raise ValueError(
                f"params[{name!r}]: does not require a gradient: pass parameters of the model, what the last step "
                "returned, or leaves (p.detach().requires_grad_()); make an update without the frozen ones"
            )
    named = dict(zip(packing.names, params))
    grads = differentiated(loss, named, "params", create_graph=not first_order, allow_unused=allow_unused)
    if all(grad is None for grad in grads):
        raise ValueError("loss: does not depend on any of the params; was it computed from others?")
    return grads


def _given(
    packing: Packing, grads: Any, params: list[Tensor], tasks: int | None, first_order: bool, allow_unused: bool
) -> list[Tensor | None]:
    """The caller's gradients in the packing's order; raises TypeError or ValueError if they do not fit."""
    grads = packing.in_order(grads, "grads") if isinstance(grads, Mapping) else listed(grads, "loss or grads")
    rows = packing.tasks(grads, "grads")
    present = [grad for grad in grads if grad is not None]
    if not present:
        raise ValueError("grads: expected at least one gradient, got None for each parameter")
    if rows != tasks:
        raise ValueError(
            f"grads: expected shapes as params have, {_described(tasks)}, got {_described(rows)}; "
            "torch.func.vmap(torch.func.grad(loss_of)) gives gradients of each task"
        )
    for name, grad in zip(packing.names, grads):
        if grad is None and not allow_unused:
            raise ValueError(f"grads[{name!r}]: expected a gradient, got None; allow_unused=True leaves it as it is")
    check_like((params[0],), present[0], "grads")
    if first_order:
        return [None if grad is None else grad.detach() for grad in grads]
    if (
        torch.is_grad_enabled()
        and not in_functorch()
        and any(param.requires_grad for param in params)
        and not any(grad.requires_grad for grad in present)
    ):
        raise ValueError(
            "grads: expected gradients with a graph, since params have one, got some without, which give first-order "
            "meta-gradients: compute them with create_graph=True, or say first_order=True"
        )
    return grads


def _described(tasks: int | None) -> str:
    return "without a task dimension" if tasks is None else f"with a task dimension of {tasks}"


def _packed(packing: Packing, grads: list[Tensor | None], tasks: int | None) -> Gradient:
    G = packing.join(grads, tasks)
    if all(grad is not None for grad in grads):
        return G, None
    used = [G.new_full((1, size), grad is not None) for grad, size in zip(grads, packing.sizes)]
    return G, torch.cat(used, dim=1)


def _is_learned(own: Tensor) -> bool:
    # In a torch.func transform, a tensor of another level that is no parameter seems to require no gradient.
    return own.requires_grad or (in_functorch() and not isinstance(own, nn.Parameter))


def _leaf(X: Tensor, requires_grad: bool) -> Tensor:
    # torch.func differentiates by explicit arguments, so a transform has no leaves.
    return X.detach() if in_functorch() else X.detach().requires_grad_(requires_grad)


def _versions(params: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(param._version for param in params)


def _nodes(tensors: Iterable[Tensor]) -> set[Any]:
    return {X.grad_fn or get_gradient_edge(X).node for X in tensors if X.requires_grad}


def _check_direct(loss: Tensor, params: Iterable[Tensor], phi: Iterable[Tensor]) -> None:
    """Raise ValueError if the graph of a loss reaches phi on a path that does not lead through params."""
    seen, wanted = _nodes(params), _nodes(phi)
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node in wanted:
            raise ValueError(
                "loss: depends on phi, the meta-parameters of the update, other than through params: the gradient by "
                "which adapt_update adapts phi would miss that part; take phi out of the loss, or adapt_update=False"
            )
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
