"""Pictures of bridges: their paths, their draws, and the history of a fit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.plots.axes import OURS, SOURCE, TARGET, array, one_axes, row_of_axes
from pyro_sb.training import FitHistory

__all__ = ["plot_history", "plot_marginal", "plot_marginals", "plot_paths"]


def plot_paths(
    bridge: Bridge,
    num_paths: int = 60,
    num_steps: int = 60,
    context: Any = None,
    *,
    axis: int | tuple[int, int] | None = None,
    ax: Any = None,
) -> Any:
    r"""Paths of a bridge from source to target.

    Args:
        bridge: Fitted.
        num_paths: How many.
        num_steps: Steps of each. (DSB fitted by IPF takes its own.)
        context: Of a conditional bridge. Shape ``(context_dim,)``.
        axis: A coordinate, drawn against time; or two, drawn against each other with the ends marked. Omitted: the
            first two, or time where there is one.
        ax: Matplotlib axes. Omitted: new ones.

    Returns:
        The axes.
    """
    ax = one_axes(ax)
    if axis is None:
        axis = (0, 1) if bridge.dim > 1 else 0
    if getattr(bridge, "method", None) == "ipf":
        num_steps = int(bridge.chain_steps)  # type: ignore[arg-type]
    with torch.no_grad():
        times, states = map(array, bridge.paths(num_paths, num_steps, context))
    if states.ndim != 3:
        raise ValueError(f"context must be one, shape ({bridge.context_dim},), got a batch. Write context[i].")
    if isinstance(axis, int):
        ax.plot(times, states[..., axis], color=OURS, alpha=0.35, lw=0.8)
        ax.set(xlabel="time", ylabel=f"x[{axis}]", xlim=(0, 1))
        return ax
    i, j = axis
    ax.plot(states[..., i], states[..., j], color="0.6", alpha=0.5, lw=0.6, zorder=1)
    ax.scatter(states[0, :, i], states[0, :, j], s=12, color=SOURCE, label="source, t = 0", zorder=2)
    ax.scatter(states[-1, :, i], states[-1, :, j], s=12, color=OURS, label="target, t = 1", zorder=3)
    ax.set(xlabel=f"x[{i}]", ylabel=f"x[{j}]")
    ax.legend(fontsize="small")
    return ax


def plot_marginals(
    bridge: Bridge | Tensor,
    target: Any = None,
    source: Any = None,
    context: Any = None,
    *,
    coords: Sequence[int] | None = None,
    num_draws: int = 5000,
    axes: Any = None,
) -> Any:
    r"""Histograms of source, target and generated draws, one picture a coordinate.

    Args:
        bridge: A fitted bridge, of which ``num_draws`` are drawn; or draws ``(n, dim)``.
        target: Draws of the target ``(N, dim)``.
        source: Draws of the source ``(M, dim)``.
        context: Of a conditional bridge: one ``(context_dim,)``.
        coords: Which coordinates. Omitted: the first four.
        num_draws: Draws of the bridge.
        axes: Axes, one a coordinate. Omitted: a row of new ones.

    Returns:
        An array of axes.
    """
    draws = bridge
    if isinstance(bridge, Bridge):
        draws = bridge(context).sample((num_draws,))
    assert isinstance(draws, Tensor)
    coords = list(range(min(4, draws.shape[-1]))) if coords is None else list(coords)
    axes = row_of_axes(axes, len(coords))
    for ax, coord in zip(axes, coords):
        plot_marginal(draws, target, source, coord=coord, ax=ax)
    axes[0].legend(fontsize="small")
    return axes


def plot_marginal(draws: Any, target: Any = None, source: Any = None, *, coord: int = 0, ax: Any = None) -> Any:
    """One coordinate of generated draws, the target's and the source's, each ``(n, dim)``; see `plot_marginals`."""
    ax = one_axes(ax)
    columns = [None if law is None else array(law)[:, coord] for law in (draws, target, source)]
    shown = [column for column in columns[:2] if column is not None]
    low, high = np.quantile(np.concatenate(shown), [0.001, 0.999])
    if columns[2] is not None and np.ptp(columns[2]) > 0:
        low, high = min(low, np.quantile(columns[2], 0.005)), max(high, np.quantile(columns[2], 0.995))
    bins = np.linspace(low, high, 60)
    styles: list[dict[str, Any]] = [
        {"histtype": "step", "color": OURS, "lw": 1.6, "label": "generated"},
        {"histtype": "stepfilled", "color": TARGET, "alpha": 0.35, "label": "target"},
        {"histtype": "step", "color": SOURCE, "ls": "--", "label": "source"},
    ]
    for i in (1, 2, 0):
        if columns[i] is not None:
            ax.hist(columns[i], bins, density=True, **styles[i])
    ax.set(xlabel=f"x[{coord}]", yticks=[])
    if len(shown) > 1:
        ax.legend(fontsize="small")
    return ax


def plot_history(history: FitHistory, *, ax: Any = None) -> Any:
    r"""Losses of a fit, its residuals on an axis of their own.

    Args:
        history: What ``fit`` returned.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = one_axes(ax)
    curves = [("training loss", history.losses, OURS), ("held-out loss", history.validation_losses, SOURCE)]
    curves = [curve for curve in curves if curve[1]]
    if not curves and not history.residuals:
        raise ValueError("history must hold losses or residuals, got neither: the fit was in closed form.")
    for name, values, colour in curves:
        ax.plot(
            _updates(history, len(values)), values, color=colour, label=name, marker="." if len(values) < 40 else ""
        )
    if history.residuals:
        side = ax.twinx() if curves else ax
        steps = _updates(history, len(history.residuals))
        side.semilogy(
            steps,
            np.maximum(history.residuals, 1e-300),
            color="0.6",
            lw=1.0,
            label="residual",
            marker="." if len(steps) < 40 else "",
        )
        side.set_ylabel("residual")
        if curves:
            handles = [pair for axes in (ax, side) for pair in zip(*axes.get_legend_handles_labels())]
            ax.legend(*zip(*handles), fontsize="small")
    if curves:
        ax.set_ylabel("loss")
        if not history.residuals:
            ax.legend(fontsize="small")
    state = "converged" if history.converged else "interrupted" if history.interrupted else "not converged"
    ax.set(xlabel="update", title=f"{history.iterations} updates, {history.seconds:.1f} s, {state}")
    return ax


def _updates(history: FitHistory, num: int) -> np.ndarray:
    """When so many evenly spaced checks of a fit were made."""
    return np.linspace(history.iterations / num if num else 0, history.iterations, num)
