"""Panels that several benchmarks draw: clouds in the plane, rows of small images."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lib.report import RESULTS


def cloud(axes: Axes, draws: Tensor, target: Tensor, title: str) -> None:
    """Draws in blue over the target's in grey, both ``(n, 2)``."""
    axes.plot(*target.T, ".", ms=1.5, color="0.75", zorder=1)
    axes.plot(*draws.T, ".", ms=1.5, color="tab:blue", zorder=2)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def mosaic(axes: Axes, rows: Sequence[Sequence[Sequence[float]]], black: float, white: float) -> None:
    """Images of 8 x 8, flat, in rows and columns with a line between."""
    grid = np.full((9 * len(rows) + 1, 9 * len(rows[0]) + 1), black)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            grid[9 * i + 1 : 9 * i + 9, 9 * j + 1 : 9 * j + 9] = np.reshape(image, (8, 8))
    axes.imshow(grid, cmap="gray_r", vmin=white, vmax=black)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)


def save(figure: Figure, name: str, dpi: int = 90) -> None:
    """Keep a picture as ``results/<name>.png``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=dpi)
