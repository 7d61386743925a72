"""The files of a run: configuration, metrics, checkpoints, scores and curves, each replaced atomically."""

from typing import TYPE_CHECKING

from kfo_ext.lazy import lazily

if TYPE_CHECKING:
    from .plots import plot_runs
    from .run_folder import RunFolder

__all__ = ["RunFolder", "plot_runs"]

__getattr__, __dir__ = lazily(globals(), {"plots": ["plot_runs"], "run_folder": ["RunFolder"]})
