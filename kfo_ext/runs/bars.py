"""Progress bars."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Without tqdm's own estimate of the time left, which covers all iterations.
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def progress_bar(*arguments: Any, shown: bool = True, **options: Any) -> tqdm:
    """Make a bar of tqdm: in a notebook a widget, or text without ipywidgets; text on a terminal; nothing elsewhere.

    Args:
        arguments: as tqdm's.
        shown: false shows nothing anywhere.
        options: as tqdm's.

    Returns:
        The bar.
    """
    # Imported late: tqdm chooses the kind of bar at import, which may come before the notebook.
    with warnings.catch_warnings():
        # It asks for ipywidgets; its text bar serves too.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm

    # tqdm disables bars without a terminal, but a notebook's output is none.
    return tqdm(*arguments, disable=(False if _in_notebook() else None) if shown else True, **options)


def _in_notebook() -> bool:
    """Whether an IPython kernel runs this process, by the rule of tqdm.auto."""
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get() if get else None
    return shell is not None and "IPKernelApp" in shell.config


class TrainingBar:
    """A bar of meta-training, with loss, accuracy and the time left.

    The time left is that of the remaining iterations, or of the time budget if that ends earlier.

    Args:
        total: meta-iterations of the run.
        done: meta-iterations done before.
        deadline: when the time budget ends, on the clock of time.monotonic; infinity without one.
        shown: as in `progress_bar`.
    """

    def __init__(self, total: int, done: int, *, deadline: float = math.inf, shown: bool = True) -> None:
        self._total, self._before, self._done = total, done, done
        self._begin, self._deadline = time.monotonic(), deadline
        self._bar = progress_bar(shown=shown, total=total, initial=done, unit="it", bar_format=FORMAT)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def left(self) -> float:
        """Seconds until training ends, at least 0; infinity before the first iteration without a budget."""
        now, here = time.monotonic(), self._done - self._before
        iterations = (now - self._begin) / here * (self._total - self._done) if here else math.inf
        return max(0.0, min(iterations, self._deadline - now))

    def show(self, record: Mapping[str, float]) -> None:
        """Count one meta-iteration, and show its loss and accuracy."""
        self._done += 1
        shown = {name: f"{record[name]:.3f}" for name in ("loss", "accuracy") if name in record}
        self._bar.set_postfix({**shown, "left": self._bar.format_interval(self.left())}, refresh=False)
        self._bar.update()

    def describe(self, text: str = "") -> None:
        """Show what is done besides iterations; "" removes it."""
        self._bar.set_description(text or None)
