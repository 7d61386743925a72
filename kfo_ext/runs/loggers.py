"""Adapters that show a run's records elsewhere than in metrics.jsonl: TensorBoard, Weights & Biases.

Nothing is imported before an adapter is asked for by its name. A logger of one's own is a function of one record.
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

    help: what it is, in a few words.
    package: what must be installed.
    load: imports it; what it returns is the first argument of `opened`.
    opened: a logger, from that, the run folder, the values of the configuration, and the meta-iterations done.
    """

    help: str
    package: str
    load: Callable[[], Any]
    opened: Callable[[Any, RunFolder, Mapping[str, Any], int], AbstractContextManager[Logger]]


def checked(loggers: Iterable[str | Logger]) -> list[str | Logger]:
    """The same, if each can be used here.

    Raises: ValueError for an unknown name, TypeError for what is neither a name nor a function, ImportError saying what
    to install.
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
    """Functions of one record, until the block ends.

    loggers: names of `LOGGERS`, and functions, which stay as they are.
    run, config: what is logged.
    iteration: meta-iterations done; records of later ones, which a killed process logged, count no more.
    Raises: as `checked`.
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
    """The numbers of a record as training/loss, validation/accuracy, ..."""
    part = "validation" if is_validation(record) else "training"
    return {f"{part}/{name.removeprefix('validation_')}": v for name, v in record.items() if name != "iteration"}


def _load_tensorboard() -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


@contextmanager
def _tensorboard(writer_class: Any, run: RunFolder, config: Mapping[str, Any], iteration: int) -> Iterator[Logger]:
    """Events in the folder tensorboard/ of the run, and the configuration as a text."""
    with writer_class(str(run.path / "tensorboard"), purge_step=iteration + 1 if iteration else None) as writer:
        table = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        writer.add_text("configuration", f"| option | value |\n|---|---|\n{table}", iteration)

        def log(record: Record) -> None:
            for name, value in _named(record).items():
                writer.add_scalar(name, value, record["iteration"])

        yield log


def _load_wandb() -> Any:
    import wandb

    # A folder of this name, such as one that it made itself, can be imported too.
    if not hasattr(wandb, "init"):
        raise ImportError("what is imported is not the package")
    return wandb


@contextmanager
def _wandb(wandb: Any, run: RunFolder, config: Mapping[str, Any], iteration: int) -> Iterator[Logger]:
    """A run of Weights & Biases, which a resumed run goes on with; its own settings come from WANDB_... variables."""
    del iteration
    path = run.path / "wandb-id"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(secrets.token_hex(8).encode())
    identity = path.read_text().strip()
    with wandb.init(dir=str(run.path), name=run.path.name, id=identity, resume="allow", config=dict(config)) as session:
        # Of validation and training there are records of one iteration each: it is an axis, not their count.
        session.define_metric("*", step_metric="iteration")

        def log(record: Record) -> None:
            session.log({"iteration": record["iteration"], **_named(record)})

        yield log


LOGGERS: dict[str, Adapter] = {
    "tensorboard": Adapter("TensorBoard, in the run folder", "tensorboard", _load_tensorboard, _tensorboard),
    "wandb": Adapter("Weights & Biases", "wandb", _load_wandb, _wandb),
}
