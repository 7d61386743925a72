"""The gradients of a loss by named parameters, with errors that say which parameter and which flag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfo_ext.transform.packing import Packing


def gradients(
    loss: Tensor,
    parameters: Sequence[Tensor],
    packing: Packing,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
    allow_nograd: bool = False,
) -> list[Tensor | None]:
    """One gradient per parameter, None where there is none and its flag allows that.

    Args:
        loss: (), the loss.
        parameters: tensors of the packing's shapes, in its order.
        packing: names and shapes.
        create_graph: keep the graph of the gradients.
        retain_graph: keep the loss's graph; as `create_graph` by default.
        allow_unused: a parameter the loss does not depend on has gradient None.
        allow_nograd: a parameter that does not require a gradient has gradient None.

    Raises:
        ValueError: a loss that is no scalar or has no graph; a list of another length or shapes; a frozen or unused
            parameter.
        TypeError: a loss or parameter that is no tensor.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)}")
    if len(parameters) != len(packing):
        raise ValueError(f"parameters: expected {len(packing)}, as given to the constructor, got {len(parameters)}")
    for name, shape, parameter in zip(packing.names, packing.shapes, parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{name!r}]: expected a tensor, got {type(parameter).__name__}")
        if parameter.shape != shape:
            raise ValueError(f"parameters[{name!r}]: expected shape {tuple(shape)}, got {tuple(parameter.shape)}")
        if not parameter.requires_grad and not allow_nograd:
            raise ValueError(
                f"parameters[{name!r}]: does not require a gradient; "
                "allow_nograd=True gives it no update instead of this error"
            )
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted:
        return [None] * len(parameters)
    if not loss.requires_grad:
        raise ValueError(
            "loss: does not depend on any parameter: it has no graph (was it computed under no_grad, or detached?)"
        )
    found = iter(
        torch.autograd.grad(loss, wanted, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True)
    )
    grads = [next(found) if parameter.requires_grad else None for parameter in parameters]
    if not allow_unused:
        for name, parameter, grad in zip(packing.names, parameters, grads):
            if grad is None and parameter.requires_grad:
                raise ValueError(
                    f"parameters[{name!r}]: the loss does not depend on it; "
                    "allow_unused=True gives it no update instead of this error"
                )
    return grads
