"""Our meta-iteration: `MAML(model, update=KFO, adapt_update=True)`, or plain `MAML`; eager, or as one CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bench.meta_case import Gradients, MetaCase, plain_network
from kfo_ext import KFO, MAML
from kfo_ext.trainer.captured_step import CapturedMetaStep, Recorder
from kfo_ext.trainer.meta_step import make_adam
from kfo_ext.trainer.precision import convolution_precision


@torch.no_grad()
def copy_factors(kfo: KFO, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives it these factors, one (R, L) per parameter."""
    for into, values in zip(kfo.factors(), factors, strict=True):
        for X, value in zip(into, values, strict=True):
            if X is not None:
                X.copy_(value)


def grads_of(parameters: Iterable[Tensor]) -> Gradients:
    """What backward left, of all of them."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def factor_gradients(kfo: KFO) -> Gradients:
    """dR and dL of each parameter: the factors' packed gradients, read as the factors themselves are."""
    factors = copy.deepcopy(kfo)
    with torch.no_grad():
        for into, parameter in zip(factors.parameters(), kfo.parameters(), strict=True):
            if parameter.grad is not None:
                into.copy_(parameter.grad)
    return [X.detach() for pair in factors.factors() for X in pair if X is not None]


class Ours:
    """Our learner; all tasks of the batch in one graph.

    backend: of the transform
    plain: take torch.nn's own network in the place of `kfo_ext.networks`'
    bf16, route: see `MAML`

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend does not run on the case's device.
    """

    def __init__(
        self, case: MetaCase, backend: str = "auto", *, plain: bool = False, bf16: bool = False, route: str = "auto"
    ) -> None:
        self.model = plain_network(case) if plain else copy.deepcopy(case.model)
        self.kfo = None
        if case.factors is not None:
            self.kfo = KFO(self.model.named_parameters(), psd=True, backend=backend)
            copy_factors(self.kfo, case.factors)
        self.maml = MAML(
            self.model,
            update=self.kfo,
            lr=case.lr,
            steps=case.steps,
            adapt_update=case.factors is not None,
            bf16=bf16,
            route=route,
        )
        self.batch = case.batch

    def run(self) -> Tensor:
        self.maml.zero_grad()
        result = self.maml(self.batch)
        result.loss.backward()
        return result.loss.detach()

    def gradients(self) -> Gradients:
        return gradients_of(self.model, self.kfo)


def gradients_of(model: nn.Module, kfo: KFO | None) -> Gradients:
    """The meta-gradients as a contender gives them: the network's, then those of the factors of an update."""
    return grads_of(model.parameters()) + ([] if kfo is None else factor_gradients(kfo))


class OursCaptured(Ours):
    """The whole meta-iteration, Adam's step at a rate of 0 included, replayed as one CUDA graph.

    recorder: of a learner, what `CapturedMetaStep` takes in the place of CUDA graphs

    Raises:
        ValueError: as `Ours`, and on a device other than CUDA.
    """

    def __init__(
        self, case: MetaCase, backend: str = "auto", *, recorder: Callable[[nn.Module], Recorder] | None = None
    ) -> None:
        super().__init__(case, backend)
        adam = make_adam(self.maml.parameters(), 0.0)
        if recorder is not None:
            adam.param_groups[0]["lr"] = torch.zeros(())
        self.step = CapturedMetaStep(self.maml, adam, recorder=recorder and recorder(self.maml))

    def run(self) -> Tensor:
        # At a rate of 0 every run starts from the same parameters, as those of the others do.
        return self.step(self.batch, 0.0).loss


class OursAtPrecision(Ours):
    """With the network's convolutions at a precision and in a memory format: see `kfo_ext.trainer.Config`."""

    def __init__(self, case: MetaCase, precision: str = "ieee", channels_last: bool = False) -> None:
        super().__init__(case, bf16=precision == "bf16")
        self.model.channels_last = channels_last
        self.precision = precision

    def run(self) -> Tensor:
        with convolution_precision(self.precision):
            return super().run()
