"""Pictures of bridges: their paths, and the history of a fit."""

from typing import Any

import numpy as np
import torch

from pyro_sb.bridges.base import Bridge
from pyro_sb.checks import whole
from pyro_sb.plots.axes import OURS, SOURCE, Size, array, check_coords, check_is, one_axes, styled
from pyro_sb.training import FitHistory

__all__ = ["plot_history", "plot_paths"]


def plot_paths(
    bridge: Bridge,
    num_paths: int = 60,
    num_steps: int = 60,
    context: Any = None,
    *,
    axis: int | tuple[int, int] | None = None,
    ax: Any = None,
    figsize: Size = None,
    **kwargs: Any,
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
        figsize: Of the new figure, in inches.
        **kwargs: Of the paths, for ``ax.plot``.

    Returns:
        The axes.

    Raises:
        TypeError: ``bridge`` is none.
        ValueError: A coordinate that the bridge has not; a batch of contexts.
    """
    check_is("bridge", bridge, "Bridge", "bridge.fit(draws), then plot_paths(bridge)")
    num_paths, num_steps = whole("num_paths", num_paths), whole("num_steps", num_steps)
    axis = ((0, 1) if bridge.dim > 1 else 0) if axis is None else axis
    if not isinstance(axis, int | tuple | list):
        raise TypeError(f"axis must be one coordinate or two, got {axis!r}. Write axis=(0, 1).")
    pair = [axis] if isinstance(axis, int) else list(axis)
    if len(pair) > 2:
        raise ValueError(f"axis must be one coordinate or two, got {axis}. Write axis=(0, 1).")
    check_coords("axis", pair, bridge.dim)
    ax = one_axes(ax, figsize)
    if getattr(bridge, "method", None) == "ipf":
        num_steps = int(bridge.num_steps)  # type: ignore[arg-type]
    with torch.no_grad():
        times, states = map(array, bridge.paths(num_paths, num_steps, context))
    if states.ndim != 3:
        raise ValueError(f"context must be one, shape ({bridge.context_dim},), got a batch. Write context[i].")
    if len(pair) == 1:
        ax.plot(times, states[..., pair[0]], **styled(kwargs, "line", color=OURS, alpha=0.35, linewidth=0.8))
        ax.set(xlabel="time", ylabel=f"x[{pair[0]}]", xlim=(0, 1))
        return ax
    i, j = pair
    style = styled(kwargs, "line", color="0.6", alpha=0.5, linewidth=0.6, zorder=1)
    ax.plot(states[..., i], states[..., j], **style)
    ax.scatter(states[0, :, i], states[0, :, j], s=12, color=SOURCE, label="source, t = 0", zorder=2)
    ax.scatter(states[-1, :, i], states[-1, :, j], s=12, color=OURS, label="target, t = 1", zorder=3)
    ax.set(xlabel=f"x[{i}]", ylabel=f"x[{j}]")
    ax.legend(fontsize="small")
    return ax


def plot_history(history: FitHistory, *, ax: Any = None, figsize: Size = None, **kwargs: Any) -> Any:
    r"""Losses of a fit, its residuals on an axis of their own.

    Args:
        history: What ``fit`` returned.
        ax: Matplotlib axes. Omitted: new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the losses, for ``ax.plot``.
    """
    check_is("history", history, "FitHistory", "plot_history(bridge.fit(draws))")
    curves = [("training loss", history.losses, OURS), ("held-out loss", history.validation_losses, SOURCE)]
    curves = [curve for curve in curves if curve[1]]
    if not curves and not history.residuals:
        raise ValueError("history must hold losses or residuals, got neither: the fit was in closed form.")
    ax = one_axes(ax, figsize)
    for name, values, colour in curves:
        style = styled(kwargs, "line", color=colour, label=name, marker="." if len(values) < 40 else "")
        ax.plot(_updates(history, len(values)), values, **style)
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
