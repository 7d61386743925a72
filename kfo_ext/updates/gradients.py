"""The gradients of a loss by named parameters, with errors that name the parameter and the flag."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from kfo_ext.ops.torch_private import transformed
from kfo_ext.packing import Packing, listed, some


def gradients(
    loss: Tensor,
    parameters: Iterable[Tensor],
    packing: Packing,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
    allow_nograd: bool = False,
) -> list[Tensor | None]:
    """Differentiate a loss by each parameter of a packing.

    Args:
        loss: (), the loss.
        parameters: tensors of the packing's shapes, in its order.
        packing: names and shapes.
        create_graph: keep the graph of the gradients.
        retain_graph: keep the loss's graph; as `create_graph` by default.
        allow_unused: a parameter that the loss does not depend on has gradient None.
        allow_nograd: a parameter that does not require a gradient has gradient None.

    Returns:
        One gradient per parameter, None where there is none and its flag allows that.

    Raises:
        ValueError: the loss is not a scalar or has no graph; the number of parameters or a shape does not fit; or a
            parameter is frozen or unused without its flag.
        TypeError: the loss or a parameter is not a tensor.
    """  # noqa: DOC501
    check_loss(loss, None)
    parameters = listed(parameters, "parameters")
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}]: expected a tensor, got {type(parameter).__name__}")
    if len(parameters) != len(packing):
        raise _wrong_number(parameters, packing)
    for name, shape, parameter in zip(packing.names, packing.shapes, parameters):
        if parameter.shape != shape:
            raise ValueError(
                f"parameters[{name!r}]: expected shape {tuple(shape)}, got {tuple(parameter.shape)}: "
                "they come in the order given to the constructor"
            )
        if not parameter.requires_grad and not allow_nograd:
            functional = "under torch.func, call transform() with gradients that torch.func.grad has computed; "
            raise ValueError(
                f"parameters[{name!r}]: does not require a gradient; {functional if transformed() else ''}"
                "allow_nograd=True gives it no update instead of this error"
            )
    return differentiated(
        loss,
        dict(zip(packing.names, parameters)),
        "parameters",
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=allow_unused,
    )


def check_loss(loss: Any, tasks: int | None) -> None:
    """Raise TypeError or ValueError unless the loss has shape (), or (tasks,) with a task dimension."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}: pass the value of a loss, computed")
    if loss.is_complex():
        raise TypeError(f"loss: expected a real floating-point number, got {loss.dtype}")
    if tasks is None and loss.numel() != 1:
        raise ValueError(
            f"loss: expected a scalar, got shape {tuple(loss.shape)}: average it, as a loss of torch does with "
            "reduction='mean'"
        )
    if tasks is not None and loss.shape != (tasks,):
        raise ValueError(
            f"loss: expected shape ({tasks},), one loss for each of the tasks that the parameters are of, got shape "
            f"{tuple(loss.shape)}; a mean over tasks would divide their gradients"
        )


def differentiated(
    loss: Tensor,
    parameters: Mapping[str, Tensor],
    argument: str,
    *,
    create_graph: bool,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
) -> list[Tensor | None]:
    """Differentiate the sum of `loss` by each parameter.

    Args:
        loss: (), or (tasks,).
        parameters: tensors by name.
        argument: what messages call the parameters.
        create_graph: keep the graph of the gradients.
        retain_graph: keep the loss's graph; as `create_graph` by default.
        allow_unused: a parameter that the loss does not depend on has gradient None.

    Returns:
        One gradient per parameter, None for one that requires none, or that is unused where that is allowed.

    Raises:
        ValueError: the loss has no graph, or a parameter is unused without its flag.
    """
    wanted = [parameter for parameter in parameters.values() if parameter.requires_grad]
    if not wanted:
        return [None] * len(parameters)
    if not loss.requires_grad:
        raise ValueError(
            "loss: does not depend on any parameter: it has no graph (was it computed under no_grad, or detached?)"
        )
    found = iter(
        torch.autograd.grad(
            loss if loss.numel() == 1 else loss.sum(),
            wanted,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    )
    grads = [next(found) if parameter.requires_grad else None for parameter in parameters.values()]
    if not allow_unused:
        for (name, parameter), grad in zip(parameters.items(), grads):
            if grad is None and parameter.requires_grad:
                raise ValueError(
                    f"{argument}[{name!r}]: the loss does not depend on it; "
                    "allow_unused=True gives it no update instead of this error"
                )
    return grads


def _wrong_number(parameters: Sequence[Tensor], packing: Packing) -> ValueError:
    given = [tuple(parameter.shape) for parameter in parameters]
    # Matched by shape, in order: tensors alone have no names.
    blocks = SequenceMatcher(
        None, [tuple(shape) for shape in packing.shapes], given, autojunk=False
    ).get_matching_blocks()
    found = {block.a + i for block in blocks for i in range(block.size)}
    used = {block.b + i for block in blocks for i in range(block.size)}
    parts = []
    if missing := [i for i in range(len(packing)) if i not in found]:
        parts.append(f"missing {packing.described(missing)}")
    if extra := [f"[{i}] {shape}" for i, shape in enumerate(given) if i not in used]:
        parts.append(f"no factors for {some(extra)}")
    return ValueError(
        f"parameters: expected {len(packing)} tensors, as given to the constructor: {packing.described()}; "
        f"got {len(given)}: {'; '.join(parts)}. Pass those alone. A KFO may be for a part of a model: "
        "KFO(model.head.named_parameters()) takes list(model.head.parameters())"
    )
