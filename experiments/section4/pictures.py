"""The pictures of Figure 1 (left) and Figure 2, from the numbers of `figures`; the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..svg import styled, svg

# One hue and dash each, so that the pictures can be read in grey.
STYLES = {"SHALLOW": ("#000000", "-"), "DEEP": ("#D55E00", "--")}
# Contour levels of the landscape; the loss at a solution is 1/2.
LEVELS = (0.5, 0.55, 0.65, 0.8, 1.0, 1.3, 1.7, 3.0)


def draw_figure1_left(numbers: Mapping[str, Any]) -> bytes:
    """Errors after one step over meta-training: a line per seed, and the best population errors."""

    def draw(axes: Any) -> None:
        for model, curves in numbers["curves"].items():
            colour, dash = STYLES[model]
            for i, curve in enumerate(curves.values()):
                label = None if i else model
                axes.plot(curve["iteration"], curve["mse"], dash, color=colour, alpha=0.8, label=label)
            axes.axhline(
                numbers["lines"][f"{model}, best"], color=colour, linestyle=":", label=f"{model}, best possible"
            )
        axes.set_xlabel("meta-iteration")
        axes.set_ylabel("mean squared error after one step")
        axes.legend(frameon=False)

    return _picture(draw, (6.0, 4.0))


def draw_figure2_left(numbers: Mapping[str, Any]) -> bytes:
    """DEEP's MAML loss over (a, b), as contours, with the four solutions."""

    def draw(axes: Any) -> None:
        filled = axes.contourf(*_grid(numbers), levels=LEVELS, cmap="Greys", extend="max", alpha=0.8)
        axes.figure.colorbar(filled, ax=axes, label="MAML loss of DEEP")
        _plane(axes, numbers)

    return _picture(draw, (5.6, 4.8))


def draw_figure2_right(numbers: Mapping[str, Any]) -> bytes:
    """The trajectories of meta-training over the contours; a dot where each begins."""

    def draw(axes: Any) -> None:
        axes.contour(*_grid(numbers), levels=LEVELS, colors="0.6", linewidths=0.7)
        _plane(axes, numbers)
        for trajectory in numbers["trajectories"]:
            axes.plot(trajectory["a"], trajectory["b"], color="#D55E00", linewidth=1.8)
            axes.plot(trajectory["a"][0], trajectory["b"][0], "o", color="#D55E00")

    return _picture(draw, (5.6, 4.8))


def _grid(numbers: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axis = np.array(numbers["axis"])
    return axis, axis, np.array(numbers["loss"])


def _plane(axes: Any, numbers: Mapping[str, Any]) -> None:
    """The solutions, and the names of the axes."""
    solutions = np.array(numbers["solutions"])
    axes.plot(solutions[:, 0], solutions[:, 1], "*", color="#0072B2", markersize=12, markeredgecolor="white")
    axes.set_xlabel("a")
    axes.set_ylabel("b")
    axes.set_aspect("equal")


def _picture(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """An SVG whose bytes depend only on its content."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        return svg(figure)
