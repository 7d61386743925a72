"""Chooses an update for each parameter by its name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor

from kfo_ext.ops.parts import Parts
from kfo_ext.packing import listed, some
from kfo_ext.updates.base import Phi, Update
from kfo_ext.updates.checks import named_alike
from kfo_ext.updates.covered import matches
from kfo_ext.updates.several import Several

# Makes the update of (name, tensor) pairs: a class, or a partial of one.
Maker = Callable[[list[tuple[str, Tensor]]], Update]


class ByName(Several):
    """An update for each block of parameters: `ByName(model.named_parameters(), {"head.*": MetaSGD, "*": KFO})`.

    A parameter gets the update of the first pattern that matches its name; each pattern must get at least one
    parameter. It takes as many inner steps as every update has meta-parameters for.

    Args:
        parameters: (name, tensor) pairs such as `model.named_parameters()`.
        updates: for each name or pattern such as "head.*" (fnmatch), a callable that makes an update of its (name,
            tensor) pairs: an update's class, or partial(KFO, psd=False) for options.

    Raises:
        ValueError: there are no parameters, no pattern matches a parameter, a pattern matches none or none that an
            earlier one left, devices are mixed, or an update was made for other parameters than its own.
        TypeError: an argument has another type, parameters are not floating point of one dtype, or a callable does not
            make an `Update`.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], updates: Mapping[str, Maker]) -> None:
        parameters = listed(parameters, "parameters", pairs=True)
        named = named_alike(parameters)
        if not all(isinstance(entry, tuple) for entry in parameters):
            raise ValueError(
                "parameters: expected (name, tensor) pairs such as model.named_parameters(), got tensors without names"
            )
        names = [name for name, _ in named]
        chosen = _choose(names, updates)
        made = []
        for i, (pattern, maker) in enumerate(updates.items()):
            own = [pair for pair, choice in zip(named, chosen) if choice == i]
            update = maker(own)
            if not isinstance(update, Update):
                raise TypeError(f"updates[{pattern!r}]: expected what makes an Update, got {type(update).__name__}")
            given = [(name, tensor.shape) for name, tensor in own]
            if list(zip(update.packing.names, update.packing.shapes)) != given:
                raise ValueError(
                    f"updates[{pattern!r}]: expected an update of the parameters that it was given, "
                    f"{some([repr(name) for name, _ in given])}, got one for {update.packing.described()}"
                )
            made.append(update)
        super().__init__(named, made)
        self._chosen = chosen
        self._parts = Parts(chosen, self.packing.sizes)

    def rule(self, phi: Phi, G: Tensor, step: int | None = None) -> Tensor:
        """Apply each block's update to its columns.

        Args:
            phi: as `self.phi`, with (tasks or 1, n) rows.
            G: (tasks, n), packed gradients.
            step: the inner step, required if one of the updates has meta-parameters per step.

        Returns:
            (tasks, n), packed updates.

        Raises:
            ValueError: phi has another number of rows, G another shape, or an update has no meta-parameters for the
                step.
        """
        if G.dim() != 2 or G.shape[1] != self.packing.numel:
            raise ValueError(f"G: expected shape (tasks, {self.packing.numel}), got {tuple(G.shape)}")
        blocks = self._parts.apart(G)
        done: dict[Hashable, Tensor] = {
            i: update.rule_at(own, blocks[i], step) for i, (update, own) in enumerate(self.shares(phi))
        }
        return self._parts.together(done)

    def options(self) -> dict[str, Any]:
        """The update of each parameter, and the options of each update."""
        return {"choice": self._chosen, **super().options()}


def _choose(names: list[str], updates: Mapping[str, Maker]) -> list[int]:
    """For each name the position of the first pattern that matches it."""
    if not isinstance(updates, Mapping):
        raise TypeError(
            f"updates: expected a dict such as {{'head.*': MetaSGD, '*': KFO}}, got {type(updates).__name__}"
        )
    for pattern, maker in updates.items():
        if not isinstance(pattern, str):
            raise TypeError(f"updates: expected names or patterns such as 'head.*', got {pattern!r}")
        if isinstance(maker, Update) or not callable(maker):
            got = f"one made already, {type(maker).__name__}" if isinstance(maker, Update) else type(maker).__name__
            raise TypeError(
                f"updates[{pattern!r}]: expected what makes an update of its parameters, such as KFO or "
                f"partial(KFO, psd=False), got {got}"
            )
    patterns = list(updates)
    hits = [[i for i, pattern in enumerate(patterns) if matches(name, pattern)] for name in names]
    for name, hit in zip(names, hits):
        if not hit:
            raise ValueError(
                f"updates: no pattern matches parameter {name!r}; add '*': GradientDescent for all that have none, got "
                f"{some(list(map(repr, patterns)), 8) or 'an empty dict'}"
            )
    chosen = [hit[0] for hit in hits]
    for i, pattern in enumerate(patterns):
        if i not in chosen:
            earlier = [patterns[hit[0]] for hit in hits if i in hit]
            why = f"{earlier[0]!r} stands before it" if earlier else f"they are {some(list(map(repr, names)), 8)}"
            raise ValueError(f"updates: {pattern!r} has no parameter: {why}")
    return chosen
