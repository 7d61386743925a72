"""Which parameters of a model the inner loop adapts; the rest is only meta-learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from kfo_ext.packing import Packing, some
from kfo_ext.updates.covered import matches

AGAIN = "after the learner was built: build it again"


def named_under(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """The parameters of a submodule ("" for the model itself) by their names in the model; ValueError without it."""
    try:
        module = model.get_submodule(part)
    except AttributeError:
        raise ValueError(f"module {part!r} was removed or renamed {AGAIN}") from None
    prefix = f"{part}." if part else ""
    return {prefix + name: parameter for name, parameter in module.named_parameters()}


def adapted_by_default(model: nn.Module) -> Any:
    """Return the parameters that a model adapts by default: its classes may list them in a property `adapted`.

    Args:
        model: the model; its class or those of its modules may have the property, as TNet has.

    Returns:
        Names of parameters, or None for all. Parameters outside the modules with the property are adapted.
    """
    modules = model.named_modules(remove_duplicate=False)
    said = {name: module for name, module in modules if isinstance(getattr(type(module), "adapted", None), property)}
    if not said or "" in said:
        return said[""].adapted if said else None
    choices = {f"{name}.": Selection(cast(Any, module).adapted) for name, module in said.items()}
    names = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        # Modules precede their submodules: the outermost one decides.
        prefix = next((prefix for prefix in choices if name.startswith(prefix)), None)
        if prefix is None or choices[prefix].fits(name.removeprefix(prefix)):
            names.append(name)
    return names


class Selection:
    """The parameters whose names fit one of the patterns, or all of them.

    Args:
        patterns: names, or shell patterns such as "head.*"; None for all.

    Raises:
        TypeError: `patterns` is no sequence of strings.
        ValueError: `patterns` is empty.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        if patterns is not None:
            if isinstance(patterns, str) or not isinstance(patterns, Sequence):
                raise TypeError(
                    f'adapted: expected a sequence of names or patterns, such as ["head.*"], or None, got {patterns!r}'
                )
            for pattern in patterns:
                if not isinstance(pattern, str):
                    raise TypeError(f"adapted: expected names or patterns, got {type(pattern).__name__}")
            if not patterns:
                raise ValueError("adapted: expected at least one name or pattern, got none")
            patterns = tuple(patterns)
        self.patterns = patterns
        self._fitting: dict[str, bool] = {}

    def fits(self, name: str) -> bool:
        """Whether a parameter of this name is adapted."""
        if self.patterns is None:
            return True
        if name not in self._fitting:
            self._fitting[name] = any(matches(name, pattern) for pattern in self.patterns)
        return self._fitting[name]

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a pattern that fits no parameter, or only some of the names of a tied one."""
        names = list(model.named_parameters(remove_duplicate=False))
        for pattern in self.patterns or ():
            if not any(matches(name, pattern) for name, _ in names):
                have = some([name for name, _ in names])
                raise ValueError(f"adapted: {pattern!r} fits no parameter of the model, which has {have}")
        first: dict[int, str] = {}
        for name, parameter in names:
            other = first.setdefault(id(parameter), name)
            if self.fits(name) != self.fits(other):
                raise ValueError(
                    f"adapted: {other!r} and {name!r} are one parameter, but the patterns fit only one of the names; "
                    "name both, or neither"
                )

    def packing(self, parameters: Mapping[str, Tensor], allow_nograd: bool) -> Packing:
        """Build the packing of the parameters to be adapted.

        Args:
            parameters: the module's parameters by their names in the model.
            allow_nograd: omit selected parameters that do not require a gradient, instead of raising.

        Returns:
            The packing, in the order of `parameters`.

        Raises:
            ValueError: a selected parameter is frozen without `allow_nograd`, none is left, or they are on several
                devices.
            TypeError: the parameters have several dtypes.
        """
        adapted = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad and self.fits(name):
                adapted[name] = parameter
            elif self.fits(name) and not allow_nograd:
                raise ValueError(
                    f"parameter {name!r} does not require a gradient; allow_nograd=True leaves it as it is, "
                    "and so does adapted=[...] without it"
                )
        if not adapted:
            raise ValueError("model: expected at least one parameter that requires a gradient, got none")
        (first, like), *others = adapted.items()
        for name, parameter in others:
            if parameter.dtype != like.dtype:
                raise TypeError(
                    f"model: expected parameters of one dtype, got {first!r} of {like.dtype} "
                    f"and {name!r} of {parameter.dtype}"
                )
            if parameter.device != like.device:
                raise ValueError(
                    f"model: expected parameters on one device, got {first!r} on {like.device} "
                    f"and {name!r} on {parameter.device}"
                )
        return Packing.of(list(adapted.items()))

    def current(self, parameters: Mapping[str, Tensor], packing: Packing) -> list[Tensor]:
        """Return the present adapted parameters.

        Args:
            parameters: the module's parameters by their names in the model.
            packing: the packing of the adapted ones, from `packing`.

        Returns:
            The parameters in the packing's order.

        Raises:
            ValueError: names, shapes or requires_grad changed after the packing was made.
        """
        for name, shape in zip(packing.names, packing.shapes):
            if name not in parameters:
                raise ValueError(f"parameter {name!r} was removed or renamed {AGAIN}")
            if not parameters[name].requires_grad:
                raise ValueError(f"parameter {name!r} was frozen {AGAIN}")
            if parameters[name].shape != shape:
                raise ValueError(
                    f"parameter {name!r} had shape {tuple(shape)} and got {tuple(parameters[name].shape)} {AGAIN}"
                )
        known = set(packing.names)
        for name, parameter in parameters.items():
            if name not in known and parameter.requires_grad and self.fits(name):
                raise ValueError(f"parameter {name!r} was added or made trainable {AGAIN}")
        return [parameters[name] for name in packing.names]
