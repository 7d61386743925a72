"""The choice of a route for each part of a model, by a plan that is valid while modules, modes, hooks, shapes stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfo_ext.packing import Packing

from .calls import exclusive
from .routes import Route, TaskByTask, Vmapped
from .vmapped import Plan, signature

# Plans to keep: enough for alternating shapes; plans of deleted modules must not accumulate.
PLANS = 8


def precision(x: Tensor, bf16: bool) -> AbstractContextManager:
    """The autocast context of a model's forward of x."""
    # Casts are not cached across forwards: a captured graph would replay without them.
    return torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()


class Plans:
    """Chooses routes, and caches the plans that decide them.

    Args:
        wanted: the route requested: "auto", "vmap" or "loop".
        bf16: as for `MAML`.
    """

    def __init__(self, wanted: str, bf16: bool) -> None:
        self.wanted, self.bf16 = wanted, bf16
        self._chosen: dict[str, str] = {}
        self._plans: dict[tuple, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Plans are valid for these modules, not for copies.
        return {**self.__dict__, "_plans": {}}

    @property
    def route(self) -> str:
        """How each part was last computed, with the reason; before any call, the requested route."""
        routes = set(self._chosen.values() or [self.wanted])
        return routes.pop() if len(routes) == 1 else ", ".join(f"{part}: {how}" for part, how in self._chosen.items())

    def choose(
        self, part: str, module: nn.Module, packing: Packing, parameters: Sequence[Tensor], theta: Tensor, x: Tensor
    ) -> Route:
        """Choose the route of a module's outputs.

        Args:
            part: the name of the model's part, for `route`.
            module: the module to call.
            packing: the packing of theta.
            parameters: the module's parameters that are packed, in the packing's order.
            theta: (tasks, n), packed parameters.
            x: (tasks, n, ...), the examples.

        Returns:
            The route, ready to compute outputs.

        Raises:
            ValueError: "vmap" was requested and does not serve the module.
        """
        reason = ""
        if self.wanted != "loop":
            with exclusive():
                route = Vmapped(module, packing, parameters)
            key = (signature(module), x.shape[1:], x.dtype, x.device, torch.is_autocast_enabled(x.device.type))
            if key not in self._plans:
                with exclusive(), precision(x, self.bf16):
                    plan = route.planned(theta[:1], x[:1])
                self._plans = {**dict(list(self._plans.items())[-(PLANS - 1) :]), key: plan}
            route.plan = self._plans[key]
            reason = route.plan.reason
            if not reason:
                self._chosen = {**self._chosen, part: "vmap"}
                return route
            if self.wanted == "vmap":
                raise ValueError(f"route: expected a network that vmap can serve: {reason}")
        self._chosen = {**self._chosen, part: f"loop: {reason}" if reason else "loop"}
        with exclusive():
            return TaskByTask(module, packing, parameters)
