"""The correct result of a meta-iteration, and the contenders that reproduce it: only these are timed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.meta_case import Network, flat, make_case
from bench.meta_contenders import CONTENDERS, trusted
from bench.meta_task_loops import learn2learn
from kfo_ext.bench.measure import one_line
from kfo_ext.bench.result import Row, finite
from kfo_ext.runs.files import atomic_write

# Relative errors allowed. In float32, rounding moves some ReLU inputs across the kink by chance: a
# correct contender has an error of 1e-5 or of 1e-2.
ALLOWED = {torch.float64: 1e-8, torch.float32: 0.1}


class Truth(NamedTuple):
    """The correct result of a meta-iteration, computed in float64 on the CPU by `meta_contenders.trusted`.

    Attributes:
        loss: the mean query loss.
        gradients: all meta-gradients, as one vector.
        flops: of convolutions in one meta-iteration, counted as torch executes them.
        checked: how it was verified in turn.
    """

    loss: float
    gradients: Tensor
    flops: int
    checked: str


def find_truth(network: Network, method: str, **settings) -> Truth:
    """Compute the trusted loss and meta-gradients, verified against learn2learn if that is installed.

    Args:
        network: sizes of the network.
        method: one of `METHODS`.
        settings: of `make_case`.

    Returns:
        The truth.

    Raises:
        AssertionError: the gradients differ from learn2learn's, or are not finite.
    """
    case = make_case(network, method, dtype=torch.float64, **settings)
    right = trusted(case)
    with FlopCounterMode(display=False) as counter:
        loss = float(right.run())
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    truth = Truth(loss, flat(right.gradients()), convolutions, "")
    if not truth.gradients.isfinite().all():
        raise AssertionError("the meta-gradients are not finite: choose a smaller lr")
    try:
        theirs = learn2learn(case)
    except ImportError:
        return truth._replace(checked="not checked: learn2learn is not installed")
    error = error_of(float(theirs.run()), flat(theirs.gradients()), truth)
    if not error <= ALLOWED[torch.float64]:
        raise AssertionError(f"the trusted meta-gradients differ from learn2learn's by {error:.1e}")
    return truth._replace(checked=f"against learn2learn: {error:.1e}")


def kept_truth(folder: Path | None, network: Network, method: str, **settings) -> Truth:
    """`find_truth`; or what it found before, where a folder keeps it: of the same code, versions and machine."""
    if folder is None:
        return find_truth(network, method, **settings)
    digest = hashlib.sha256(repr((network, method, sorted(settings.items()))).encode()).hexdigest()[:16]
    path = folder / f"{digest}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(find_truth(network, method, **settings)._asdict(), file)
    return Truth(**torch.load(path, weights_only=True))


def error_of(loss: float, gradients: Tensor, truth: Truth) -> float:
    """The larger of two relative errors: the loss's, and that of all meta-gradients as one vector."""
    if gradients.shape != truth.gradients.shape:
        raise AssertionError(f"WRONG: {len(gradients)} meta-gradients where there are {len(truth.gradients)}")
    apart = (gradients - truth.gradients).norm() / truth.gradients.norm()
    # Not max(): it may drop a NaN.
    return torch.stack([apart, torch.tensor(abs(loss - truth.loss) / abs(truth.loss))]).max().item()


def verified(
    network: Network, method: str, names: Sequence[str], truth: Truth, *, device: str = "cpu", **settings
) -> tuple[dict[str, Callable[[], object]], dict[str, Row]]:
    """Verify contenders, which may then be timed in float32.

    Args:
        network: sizes of the network.
        method: one of `METHODS`.
        names: keys of `CONTENDERS[method]`.
        truth: of the same settings.
        device: cpu or cuda.
        settings: of `make_case`: tasks, steps, lr.

    Returns:
        The runs of correct contenders by name, and a row per contender: its errors, or why it is not timed.
    """  # noqa: DOC501  caught here
    functions, rows = {}, {}
    for name in names:
        row = rows[name] = {"contender": name, "status": "ok"}
        try:
            for dtype, allowed in ALLOWED.items():
                case = make_case(network, method, dtype=dtype, device=device, **settings)
                start = perf_counter()
                contender = CONTENDERS[method][name](case)
                loss = float(contender.run())
                row["first_run"] = perf_counter() - start
                error = error_of(loss, flat(contender.gradients()), truth)
                row[f"{dtype} error"] = finite(error)
                if not error <= allowed:
                    raise AssertionError(f"WRONG: {dtype} loss or meta-gradients are off by {error:.1e}")
            functions[name] = contender.run
        except Exception as error:  # any error is a result to report
            row["status"] = one_line(error)
    return functions, rows
