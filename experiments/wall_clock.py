"""Seconds of meta-training until a method reaches an accuracy, ours and learn2learn's, one after the other.

The clock counts meta-iterations, including the sampling of their tasks, but not validations. The target is reached at
the first validation whose mean accuracy is not below it: every method has the same number of tries, and the resolution
is the distance of two validations.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kfo_ext.interop.learn2learn import light_import
from kfo_ext.machine import environment
from kfo_ext.runs.files import read_json, write_json
from kfo_ext.tasks import TaskBatch
from kfo_ext.tasks.checks import check_count
from kfo_ext.trainer import Config
from kfo_ext.trainer.evaluation import Cancelled
from kfo_ext.trainer.recipe import EVALUATION_SEED, build_family
from kfo_ext.trainer.signals import stop_requested

from .contestants import Contestant, Learn2Learn, Ours, Stop, apart, check_peer
from .entry import Roots
from .jobs import Job, Settings, digest
from .training import configuration

# Largest relative distance of first losses and meta-gradients in float64; rounding stays below.
ALLOWED = 1e-8
PEER = "learn2learn"


class Race(NamedTuple):
    """The settings common to all measurements: see `wall_clock`."""

    target: float
    validate_every: int
    validation_tasks: int
    most_iterations: int
    threads: int


def wall_clock(
    *,
    roots: Roots,
    folder: Path,
    settings: Mapping[str, Settings],
    target: float,
    validate_every: int,
    validation_tasks: int,
    most_iterations: int,
    seeds: Sequence[int],
    threads: int,
    peers: Sequence[str],
) -> dict[str, Any]:
    """Measure every method with every seed: all methods with the first seed, then all with the second, and so on.

    Args:
        roots: the folder of the methods' data set; empty for procedural data.
        folder: receives a file for each measurement, named by everything that determines it, so that a later call
            repeats none.
        settings: each method's options of `kfo_ext.trainer.Config`; data, ways, shots and meta-batch should be common.
        target: mean accuracy on validation tasks 0 .. validation_tasks - 1 of unseen classes.
        validate_every: meta-iterations between two validations.
        validation_tasks: number of validation tasks.
        most_iterations: the limit for a method that does not reach the target.
        seeds: seeds of the network's initialization and of the training tasks.
        threads: torch's threads during the measurement; they are restored afterwards.
        peers: methods that learn2learn meta-trains too, with the same initialization, Adam and tasks.

    Returns:
        The arguments; `apart`, for each peer the relative distance of its first loss and meta-gradients from ours; and
        `runs`, for each method its measurements by seed: `seconds` and `iterations` to the target (None if it was not
        reached), `ended` (the reason for an early end, or ""), `curve`, rows of seconds, iteration and accuracy, and
        `load`, the machine's in the last minute: above `threads` if other programs ran at the same time.

    Raises:
        ValueError: an argument is out of range; or there is a peer without learn2learn, with an unsupported
            configuration, or with other first meta-gradients than ours.
        TypeError: an argument has another type.
        Cancelled: a signal requested a stop; finished measurements are kept.
    """
    race = Race(target, validate_every, validation_tasks, most_iterations, threads)
    _check(race, settings, seeds, peers)
    configs = {name: [_config(roots, each, seed, race) for seed in seeds] for name, each in settings.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with stop_requested() as stop:
            found = {name: _equal(name, configs[name][0]) for name in peers}
            runs: dict[str, list[dict[str, Any]]] = {}
            for number in range(len(seeds)):
                for peer, name in [*((False, name) for name in settings), *((True, name) for name in peers)]:
                    label = f"{PEER} {name}" if peer else name
                    runs.setdefault(label, []).append(_measured(folder, label, configs[name][number], peer, race, stop))
    finally:
        torch.set_num_threads(before)
    return {
        "settings": {name: dict(each) for name, each in settings.items()},
        **race._asdict(),
        "seeds": list(seeds),
        "peers": list(peers),
        PEER: version(PEER) if peers else None,
        "apart": found,
        "runs": runs,
    }


def _check(race: Race, settings: Mapping[str, Settings], seeds: Sequence[int], peers: Sequence[str]) -> None:
    if not 0 < race.target <= 1:
        raise ValueError(f"target: expected an accuracy above 0, at most 1, got {race.target}")
    check_count("validation_tasks", race.validation_tasks, 2)
    for name in ("validate_every", "most_iterations", "threads"):
        check_count(name, getattr(race, name), 1)
    if not settings:
        raise ValueError("settings: expected at least one method, got none")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected at least one, each once, got {list(seeds)}")
    if len(set(peers)) != len(peers):
        raise ValueError(f"peers: expected each once, got {list(peers)}")
    if unknown := [name for name in peers if name not in settings]:
        raise ValueError(f"peers: expected methods of settings, got {unknown[0]!r}")
    if peers:
        try:
            light_import()
        except ImportError as error:
            raise ValueError(f"peers: {error}\nor measure without: peers=()") from None


def _config(roots: Roots, settings: Settings, seed: int, race: Race) -> Config:
    job = Job(settings={**settings, "seed": seed}, iterations=race.most_iterations)
    return configuration(job, roots.get(settings.get("dataset", "")))


def _first(config: Config) -> TaskBatch:
    return build_family(config, "train", seed=config.seed).sample(0, config.meta_batch)


def _equal(name: str, config: Config) -> float:
    check_peer(config)
    distance = apart(config, _first(config))
    if not distance <= ALLOWED:
        raise ValueError(
            f"{name}: expected learn2learn's first meta-gradients to be ours in float64, got a relative distance of "
            f"{distance:.1e}: nothing is timed"
        )
    return distance


def _measured(folder: Path, label: str, config: Config, peer: bool, race: Race, stop: Stop) -> dict[str, Any]:
    """One measurement, from its file if there is one."""
    here = environment()
    machine = {name: here[name] for name in ("processor", "cores", "torch")}
    # The data's folder and the trainer's threads do not affect the measurement.
    options = {name: value for name, value in config.values.items() if name not in ("data_root", "threads")}
    name = digest({"label": label, "options": options, **race._asdict(), "machine": machine})
    path = folder / f"{label.replace(' ', '-')}-{config.seed}-{name}.json"
    if path.exists():
        return read_json(path)
    measurement = {"seed": config.seed, **_measure(config, peer, race, stop)}
    measurement |= {"commit": here["commit"], "load": round(os.getloadavg()[0], 2)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, measurement)
    return measurement


def _measure(config: Config, peer: bool, race: Race, stop: Stop) -> dict[str, Any]:
    family = build_family(config, "train", seed=config.seed)
    validation = build_family(config, "validation", seed=EVALUATION_SEED)
    first = family.sample(0, config.meta_batch)
    # A warm-up: a first call loads code that later calls of any method share.
    _made(config, peer, first).iterate(first)
    contestant = _made(config, peer, first)
    seconds, curve, reached, ended = 0.0, [], False, ""
    for iteration in range(1, race.most_iterations + 1):
        if stop():
            raise Cancelled
        begin = time.monotonic()
        try:
            contestant.iterate(family.sample(iteration - 1, config.meta_batch))
            seconds += time.monotonic() - begin
            if iteration % race.validate_every and iteration < race.most_iterations:
                continue
            accuracy = contestant.accuracy(validation, race.validation_tasks, stop)
        except FloatingPointError as error:
            ended = f"iteration {iteration}: {error}"
            break
        curve.append([round(seconds, 3), iteration, round(accuracy, 5)])
        if reached := accuracy >= race.target:
            break
    return {
        "seconds": curve[-1][0] if reached else None,
        "iterations": curve[-1][1] if reached else None,
        "ended": ended,
        "curve": curve,
    }


def _made(config: Config, peer: bool, first: TaskBatch) -> Contestant:
    return Learn2Learn(config, first) if peer else Ours(config)
