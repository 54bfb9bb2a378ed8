"""Histograms of draws beside the target's and the source's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge
from pyro_sb.checks import as_draws, floats, whole
from pyro_sb.plots.axes import OURS, SOURCE, TARGET, Size, array, check_coords, one_axes, row_of_axes, styled

__all__ = ["plot_marginal", "plot_marginals"]

NUM_BINS = 60


def plot_marginals(
    bridge: Any,
    target: Any = None,
    source: Any = None,
    context: Any = None,
    *,
    coords: Sequence[int] | None = None,
    num_draws: int = 5000,
    axes: Any = None,
    figsize: Size = None,
    **kwargs: Any,
) -> Any:
    r"""Histograms of source, target and generated draws, one picture a coordinate.

    Args:
        bridge: A fitted bridge, of which ``num_draws`` are drawn; or draws ``(n, dim)``, an array or a tensor.
        target: Draws of the target ``(N, dim)``, or a distribution.
        source: Draws of the source ``(M, dim)``, or a distribution.
        context: Of a conditional bridge: one ``(context_dim,)``.
        coords: Which coordinates. Omitted: the first four.
        num_draws: Draws of the bridge and of a distribution.
        axes: Axes, one a coordinate. Omitted: a row of new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the generated draws, for ``ax.hist``; ``bins`` is for all.

    Returns:
        An array of axes.

    Raises:
        TypeError: Neither a bridge nor draws.
        ValueError: Draws of another shape, not finite, or fewer than two; a coordinate that they have not; a batch of
            contexts.
    """
    num_draws = whole("num_draws", num_draws, 2)
    if context is not None and not isinstance(bridge, Bridge):
        raise ValueError("context is a conditional bridge's, got draws. Leave it out, or pass the bridge.")
    draws = _generated(bridge, context, num_draws) if isinstance(bridge, Bridge) else _points("draws", bridge)
    dim = draws.shape[1]
    coords = list(range(min(4, dim))) if coords is None else list(coords)
    check_coords("coords", coords, dim)
    target, source = (_points(n, x, dim, num_draws) for n, x in (("target", target), ("source", source)))
    axes = row_of_axes(axes, len(coords), figsize=figsize)
    for ax, coord in zip(axes, coords):
        plot_marginal(draws, target, source, coord=coord, ax=ax, **kwargs)
    axes[0].legend(fontsize="small")
    return axes


def plot_marginal(
    draws: Any,
    target: Any = None,
    source: Any = None,
    *,
    coord: int = 0,
    ax: Any = None,
    figsize: Size = None,
    **kwargs: Any,
) -> Any:
    """One coordinate of generated draws, the target's and the source's, each ``(n, dim)``; see `plot_marginals`."""
    draws = _points("draws", draws)
    dim = draws.shape[1]
    check_coords("coord", [coord], dim)
    laws = {"generated": draws, "target": _points("target", target, dim), "source": _points("source", source, dim)}
    columns = {name: array(law)[:, coord] for name, law in laws.items() if law is not None}
    ax = one_axes(ax, figsize)
    bins = _bins(columns, kwargs.pop("bins", NUM_BINS))
    for name in ("target", "source", "generated"):  # the last on top
        if name in columns:
            _histogram(ax, name, columns[name], bins, kwargs if name == "generated" else {})
    ax.set(xlabel=f"x[{coord}]", yticks=[])
    if len(columns) > 1:
        ax.legend(fontsize="small")
    return ax


def _generated(bridge: Bridge, context: Any, num_draws: int) -> Tensor:
    draws = bridge(context).sample((num_draws,))
    if draws.dim() != 2:
        raise ValueError(f"context must be one, shape ({bridge.context_dim},), got a batch. Write context[i].")
    return draws


def _points(name: str, law: Any, dim: int | None = None, num_draws: int = 5000) -> Any:
    """Draws ``(n, dim)`` of an array, a tensor or a distribution; None of None."""
    if law is None and dim is not None:
        return None
    if not isinstance(law, Distribution):
        law = floats(name, law)
        dim = (int(law.shape[1]) if law.dim() == 2 else 1) if dim is None else dim
    elif dim is None:
        dim = int(law.event_shape[0]) if len(law.event_shape) == 1 else 1
    return as_draws(name, law, dim, num_draws=num_draws)


def _bins(columns: Mapping[str, np.ndarray], wanted: Any) -> Any:
    """Edges over nearly all draws of each law; of a source, which may be wide, over less."""
    if not isinstance(wanted, (int, np.integer)):
        return wanted
    tails = {name: 0.005 if name == "source" else 0.001 for name in columns}
    low = min(np.quantile(column, tails[name], method="lower") for name, column in columns.items())
    high = max(np.quantile(column, 1 - tails[name], method="higher") for name, column in columns.items())
    if low == high:
        pad = max(0.5, 1e-6 * abs(low))
        low, high = low - pad, high + pad
    return np.linspace(low, high, wanted)


def _histogram(ax: Any, name: str, column: np.ndarray, bins: Any, kwargs: Mapping[str, Any]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "generated": {"histtype": "step", "color": OURS, "linewidth": 1.6},
        "target": {"histtype": "stepfilled", "color": TARGET, "alpha": 0.35},
        "source": {"histtype": "step", "color": SOURCE, "linestyle": "--"},
    }
    if name == "source" and np.ptp(column) == 0:  # a point has no histogram
        ax.axvline(float(column[0]), color=SOURCE, ls="--", label=name)
        return
    style = styled(kwargs, "patch", **{"label": name, "density": True, **styles[name]})
    ax.hist(column, bins, **style)
