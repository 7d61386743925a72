"""learn2learn's LearnableOptimizer: steps whose transform learns from the next loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .modules import replace_parameters
from .parameter_update import ParameterUpdate


class LearnableOptimizer(nn.Module):
    """Moves a model by a learned transform of its gradients; the next backward pass differentiates that transform.

    The graph reaches back one step: the parameters at the start of a step are constants. After a step the model's
    parameters are tensors of the graph; `model.parameters()` returns them.

    Args:
        model: the network, which is not a submodule of this module.
        transform: as for `ParameterUpdate`.
        lr: the learning rate.

    Raises:
        TypeError: the model is no module.
    """

    def __init__(self, model: nn.Module, transform: Callable[[Tensor], nn.Module | None], lr: float = 1.0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}: pass the model, not its parameters")
        # In a dict, so that torch does not register it as a submodule.
        self.info = {"model": model}
        self.update = ParameterUpdate(model.named_parameters(), transform)
        self.lr = lr
        self._steps = 0

    def step(self, closure: None = None) -> None:
        """Move the parameters that have a gradient.

        Args:
            closure: None; compute and differentiate the loss before a step.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("closure: expected None, since the loss is computed and differentiated before a step")
        model = self.info["model"]
        parameters = list(model.parameters())
        grads = [None if X.grad is None else X.grad.detach() for X in parameters]
        with torch.enable_grad():
            updates = self.update.transform(grads, self._steps if self.update.steps is not None else None)
            moved = [None if U is None else X.detach() - self.lr * U for X, U in zip(parameters, updates, strict=True)]
            # Without a learned transform the result is a leaf.
            moved = [X if X is None or X.requires_grad else X.requires_grad_() for X in moved]
        replace_parameters(model, moved)
        for X in moved:
            if X is not None:
                X.retain_grad()
        self._steps += 1

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Reset the gradients of the model, but not those of the transform, to zeros or None."""
        for X in self.info["model"].parameters():
            if X.grad is not None:
                # The graph of the step reads the old one.
                X.grad = None if set_to_none else torch.zeros_like(X)
