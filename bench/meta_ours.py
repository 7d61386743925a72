"""Our meta-iteration: `MAML(model, update=KFO, adapt_update=True)`, or plain `MAML`."""

from __future__ import annotations

import copy

import torch
from meta_case import Gradients, MetaCase, plain_network
from torch import Tensor

from kfo_ext import KFO, MAML


class Ours:
    """Our learner; all tasks of the batch in one graph.

    backend: of the transform
    plain: take torch.nn's own network in the place of `kfo_ext.models`'

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend does not run on the case's device.
    """

    def __init__(self, case: MetaCase, backend: str = "auto", *, plain: bool = False) -> None:
        self.model = plain_network(case) if plain else copy.deepcopy(case.model)
        self.kfo = None
        if case.factors is not None:
            self.kfo = KFO(self.model.named_parameters(), psd=True, backend=backend)
            with torch.no_grad():
                for into, values in zip(self.kfo.factors(), case.factors, strict=True):
                    for X, value in zip(into, values, strict=True):
                        X.copy_(value)
        self.maml = MAML(
            self.model, update=self.kfo, lr=case.lr, steps=case.steps, adapt_update=case.factors is not None
        )
        self.batch = case.batch

    def run(self) -> Tensor:
        self.maml.zero_grad()
        result = self.maml(self.batch)
        result.loss.backward()
        return result.loss.detach()

    def gradients(self) -> Gradients:
        gradients = [parameter.grad for parameter in self.model.parameters()]
        if self.kfo is not None:
            # The factors' packed gradients, read as the factors themselves are.
            factors = copy.deepcopy(self.kfo)
            with torch.no_grad():
                for into, parameter in zip(factors.parameters(), self.kfo.parameters(), strict=True):
                    into.copy_(parameter.grad)
            gradients += [X.detach() for pair in factors.factors() for X in pair]
        return gradients
