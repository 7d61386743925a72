"""Adapters that log a run's records besides metrics.jsonl: to TensorBoard or Weights & Biases.

A package is imported only if its adapter is selected by name. A custom logger is a function of one record.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .files import atomic_write
from .metrics import Logger, Record, is_validation
from .run_folder import RunFolder


@dataclass(frozen=True)
class Adapter:
    """A row of `LOGGERS`.

    Attributes:
        help: what it is, in a few words.
        package: the package that must be installed.
        load: imports it and returns the first argument of `opened`.
        opened: opens a logger, given that, the run folder, the values of the configuration, and the meta-iterations
            done.
    """

    help: str
    package: str
    load: Callable[[], Any]
    opened: Callable[[Any, RunFolder, Mapping[str, Any], int], AbstractContextManager[Logger]]


def checked(loggers: Iterable[str | Logger]) -> list[str | Logger]:
    """Check that each logger can be used here.

    Args:
        loggers: names of `LOGGERS`, and functions of one record.

    Returns:
        The loggers as a list.

    Raises:
        ValueError: a name is unknown, or occurs twice.
        TypeError: a logger is neither a name nor a function.
        ImportError: a package is missing; the message says what to install.
    """
    if isinstance(loggers, str):
        raise TypeError(f"loggers: expected a list of names and functions, got {loggers!r}")
    loggers = list(loggers)
    for logger in loggers:
        if not isinstance(logger, str):
            if not callable(logger):
                raise TypeError(f"loggers: expected names and functions of one record, got {logger!r}")
        elif logger not in LOGGERS:
            raise ValueError(f"loggers: expected one of {', '.join(LOGGERS)}, got {logger!r}")
        else:
            _loaded(logger)
    if twice := [name for name in LOGGERS if loggers.count(name) > 1]:
        raise ValueError(f"loggers: expected each once, got {twice[0]!r} several times")
    return loggers


@contextmanager
def opened(
    loggers: Iterable[str | Logger], run: RunFolder, config: Mapping[str, Any], iteration: int
) -> Iterator[list[Logger]]:
    """Open loggers for the duration of a block.

    Args:
        loggers: names of `LOGGERS`, and functions, which are passed through.
        run: the run folder.
        config: the values of the configuration.
        iteration: meta-iterations done; later records, which a killed process logged, are superseded.

    Yields:
        Functions of one record.

    Raises:
        ValueError: as `checked`.
        TypeError: as `checked`.
        ImportError: as `checked`.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(LOGGERS[logger].opened(_loaded(logger), run, config, iteration))
            if isinstance(logger, str)
            else logger
            for logger in checked(loggers)
        ]


def _loaded(name: str) -> Any:
    adapter = LOGGERS[name]
    try:
        return adapter.load()
    except ImportError as error:
        raise ImportError(
            f"loggers: {name!r} needs the package {adapter.package}, which cannot be imported ({error}); "
            f"install it: pip install {adapter.package}"
        ) from None


def _named(record: Record) -> dict[str, float]:
    """The numbers of a record under names such as training/loss and validation/accuracy."""
    part = "validation" if is_validation(record) else "training"
    return {f"{part}/{name.removeprefix('validation_')}": v for name, v in record.items() if name != "iteration"}


def _load_tensorboard() -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


@contextmanager
def _tensorboard(writer_class: Any, run: RunFolder, config: Mapping[str, Any], iteration: int) -> Iterator[Logger]:
    """Events in the folder tensorboard/ of the run, and the configuration as a text."""
    with writer_class(str(run.tensorboard), purge_step=iteration + 1 if iteration else None) as writer:
        table = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        writer.add_text("configuration", f"| option | value |\n|---|---|\n{table}", iteration)

        def log(record: Record) -> None:
            for name, value in _named(record).items():
                writer.add_scalar(name, value, record["iteration"])

        yield log


def _load_wandb() -> Any:
    import wandb

    # A folder of this name, such as the one that wandb creates, can be imported too.
    if not hasattr(wandb, "init"):
        raise ImportError("what is imported is not the package")
    return wandb


@contextmanager
def _wandb(wandb: Any, run: RunFolder, config: Mapping[str, Any], iteration: int) -> Iterator[Logger]:
    """A run of Weights & Biases, continued by a resumed run; WANDB_... variables hold its own settings."""
    del iteration
    if not run.wandb_id.exists():
        with atomic_write(run.wandb_id) as file:
            file.write(secrets.token_hex(8).encode())
    identity = run.wandb_id.read_text().strip()
    with wandb.init(dir=str(run.path), name=run.path.name, id=identity, resume="allow", config=dict(config)) as session:
        # A validation and a training record share an iteration, so the x axis is the iteration, not their count.
        session.define_metric("*", step_metric="iteration")

        def log(record: Record) -> None:
            session.log({"iteration": record["iteration"], **_named(record)})

        yield log


LOGGERS: dict[str, Adapter] = {
    "tensorboard": Adapter("TensorBoard, in the run folder", "tensorboard", _load_tensorboard, _tensorboard),
    "wandb": Adapter("Weights & Biases", "wandb", _load_wandb, _wandb),
}
