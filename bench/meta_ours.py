"""kfo_ext's meta-iteration: `MAML(model, update=KFO, adapt_update=True)` or plain `MAML`; eager or as a CUDA graph."""

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
    """Copy factors into a KFO, one (R, L) per parameter."""
    for into, values in zip(kfo.factors(), factors, strict=True):
        for X, value in zip(into, values, strict=True):
            if X is not None:
                X.copy_(value)


def grads_of(parameters: Iterable[Tensor]) -> Gradients:
    """The gradients that backward left, one per parameter."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def factor_gradients(kfo: KFO) -> Gradients:
    """Read dR and dL of each parameter from the packed gradients, as the factors themselves are read.

    Args:
        kfo: after a backward.

    Returns:
        dR and dL of each parameter in turn.
    """
    factors = copy.deepcopy(kfo)
    with torch.no_grad():
        for into, parameter in zip(factors.parameters(), kfo.parameters(), strict=True):
            if parameter.grad is not None:
                into.copy_(parameter.grad)
    return [X.detach() for pair in factors.factors() for X in pair if X is not None]


class Ours:
    """The learner of kfo_ext; all tasks of the batch in one graph.

    Args:
        case: the operands.
        backend: of the transform.
        plain: use torch.nn's own network instead of that of `kfo_ext.networks`.
        bf16: see `MAML`.
        route: see `MAML`.

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
        """Compute the loss and its backward pass."""
        self.maml.zero_grad()
        result = self.maml(self.batch)
        result.loss.backward()
        return result.loss.detach()

    def gradients(self) -> Gradients:
        """The meta-gradients of the last run."""
        return gradients_of(self.model, self.kfo)


def gradients_of(model: nn.Module, kfo: KFO | None) -> Gradients:
    """The meta-gradients in a contender's order: the network's, then those of the factors of an update."""
    return grads_of(model.parameters()) + ([] if kfo is None else factor_gradients(kfo))


class OursCaptured(Ours):
    """The whole meta-iteration, including Adam's step at a rate of 0, replayed as one CUDA graph.

    Args:
        case: as for `Ours`.
        backend: as for `Ours`.
        recorder: makes a learner's recorder for `CapturedMetaStep`, instead of CUDA graphs.

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
        # At a rate of 0 every run starts from the same parameters, as for the other contenders.
        """Replay the meta-iteration."""
        return self.step(self.batch, 0.0).loss


class OursAtPrecision(Ours):
    """`Ours` with the network's convolutions at a precision and in a memory format: see `kfo_ext.trainer.Config`."""

    def __init__(self, case: MetaCase, precision: str = "ieee", channels_last: bool = False) -> None:
        super().__init__(case, bf16=precision == "bf16")
        self.model.channels_last = channels_last
        self.precision = precision

    def run(self) -> Tensor:
        """As `Ours`, at that precision."""
        with convolution_precision(self.precision):
            return super().run()
