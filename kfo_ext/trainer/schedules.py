"""The table of schedules of the outer learning rate. No torch.

Unlike in torch's schedulers, a rate depends only on the number of the meta-iteration, not on the rates before it: a run
that is resumed or extended needs no state of its schedule to continue exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .options import TRAINING, Option, Part

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Schedule(Part):
    """A row of `SCHEDULES`.

    Attributes:
        factor: the rate relative to `meta_lr`, from the meta-iterations since the warm-up (0 is the first) and the
            values of all options.
    """

    factor: Callable[[int, Values], float]


def meta_rate(schedule: Schedule, iteration: int, values: Values) -> float:
    """Compute the outer learning rate: linear from meta_lr / warm-up to meta_lr, then as scheduled.

    Args:
        schedule: the run's schedule.
        iteration: the meta-iteration; 0 is the first.
        values: of all options.

    Returns:
        The rate.
    """
    warmup = values["meta_lr_warmup"]
    if iteration < warmup:
        return values["meta_lr"] * ((iteration + 1) / warmup)
    return values["meta_lr"] * schedule.factor(iteration - warmup, values)


def _constant(iteration: int, values: Values) -> float:
    del iteration, values
    return 1.0


def _half_life(iteration: int, values: Values) -> float:
    return 0.5 ** (iteration / values["meta_lr_half_life"])


def _cosine(iteration: int, values: Values) -> float:
    done = min(iteration / values["meta_lr_iterations"], 1.0)
    end = values["meta_lr_end"] / values["meta_lr"]
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * done)) / 2.0


def _step(iteration: int, values: Values) -> float:
    return values["meta_lr_factor"] ** (iteration // values["meta_lr_every"])


def _rest(before: Values) -> int:
    return before["iterations"] - before["meta_lr_warmup"]


def _check_cosine(values: Values) -> None:
    length = values["meta_lr_warmup"] + values["meta_lr_iterations"]
    if values["iterations"] > length and not values["meta_lr_end"]:
        raise ValueError(
            f"iterations: expected at most {length}, where the outer rate comes to 0, got {values['iterations']}: "
            "give a larger meta_lr_iterations, or a meta_lr_end above 0"
        )


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(help="stays as it is", factor=_constant),
    "half_life": Schedule(
        help="halves, smoothly",
        factor=_half_life,
        options={
            "meta_lr_half_life": Option(
                kind=int,
                default=None,
                help="meta-iterations in which the outer learning rate halves",
                least=1,
                role=TRAINING,
                required=True,
            )
        },
    ),
    "cosine": Schedule(
        help="half a cosine down to its end",
        factor=_cosine,
        options={
            "meta_lr_iterations": Option(
                kind=int,
                default=_rest,
                shown="those after the warm-up",
                help="meta-iterations until the outer learning rate is at its end, where it stays",
                least=1,
                role=TRAINING,
            ),
            "meta_lr_end": Option(
                kind=float, default=0.0, help="outer learning rate at the end", least=0, role=TRAINING
            ),
        },
        check=_check_cosine,
    ),
    "step": Schedule(
        help="multiplied by a factor at equal distances",
        factor=_step,
        options={
            "meta_lr_every": Option(
                kind=int,
                default=None,
                help="meta-iterations between two changes of the outer learning rate",
                least=1,
                role=TRAINING,
                required=True,
            ),
            "meta_lr_factor": Option(
                kind=float, default=0.1, help="what each multiplies it by", positive=True, role=TRAINING
            ),
        },
    ),
}
