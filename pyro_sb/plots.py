"""Pictures of bridges, fits and diagnostics; each draws into axes that are given or made, and returns them.

Matplotlib is imported when the first picture is drawn. Nothing is shown or saved: that is the caller's.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.diagnostics.calibration import Calibration
from pyro_sb.diagnostics.chain_figures import ChainFigures
from pyro_sb.diagnostics.lines import COLOURS, Report
from pyro_sb.diagnostics.mode_audit import ModeAudit
from pyro_sb.diagnostics.psis import PSIS
from pyro_sb.training import FitHistory

__all__ = [
    "plot_chains",
    "plot_coverage",
    "plot_history",
    "plot_marginal",
    "plot_marginals",
    "plot_modes",
    "plot_paths",
    "plot_report",
    "plot_sbc",
    "plot_weights",
]

MOST = 40  # numbers of a run, or parameters, that have room in one picture
TARGET, OURS, SOURCE, WARN = "0.35", "C0", "C1", "C3"


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
    ax = _axes(ax)
    if axis is None:
        axis = (0, 1) if bridge.dim > 1 else 0
    if getattr(bridge, "method", None) == "ipf":
        num_steps = int(bridge.chain_steps)  # type: ignore[arg-type]
    with torch.no_grad():
        times, states = map(_array, bridge.paths(num_paths, num_steps, context))
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
    axes = _row(axes, len(coords))
    for ax, coord in zip(axes, coords):
        plot_marginal(draws, target, source, coord=coord, ax=ax)
    axes[0].legend(fontsize="small")
    return axes


def plot_marginal(draws: Any, target: Any = None, source: Any = None, *, coord: int = 0, ax: Any = None) -> Any:
    """One coordinate of generated draws, the target's and the source's, each ``(n, dim)``; see `plot_marginals`."""
    ax = _axes(ax)
    columns = [None if law is None else _array(law)[:, coord] for law in (draws, target, source)]
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


def plot_sbc(
    calibration: Calibration, *, level: float = 0.95, names: Sequence[str] | None = None, ax: Any = None
) -> Any:
    r"""Difference of the ranks' ECDF from the diagonal, with simultaneous bands.

    A posterior that is too narrow draws an S that rises first, one too wide falls first, a bias an arch.

    Args:
        calibration: Of `sbc`, `tarp` or `Calibration.of`.
        level: Of the bands, for one parameter.
        names: Which parameters. Omitted: all; those that leave the bands are named.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = _axes(ax)
    bands = calibration.bands(level)
    found = calibration.ecdf_difference(bands.points)
    wanted = list(calibration.names) if names is None else list(names)
    unknown = sorted(set(wanted) - set(calibration.names))
    if unknown:
        raise ValueError(f"names must be parameters of the calibration, got {unknown}. Known: {calibration.names}.")
    points = _array(bands.points)
    ax.fill_between(points, _array(bands.lower), _array(bands.upper), color="0.85", label=f"{level:.0%} of exact ones")
    for name in wanted:
        line = found[:, calibration.names.index(name)]
        outside = bool(((line < bands.lower - 1e-9) | (line > bands.upper + 1e-9)).any())
        style = {"color": WARN, "label": name, "zorder": 3} if outside else {"color": OURS, "alpha": 0.6}
        ax.plot(points, _array(line), lw=1.2, **style)
    ax.axhline(0, color="0.5", lw=0.6)
    ax.set(xlabel="rank / (L + 1)", ylabel="ECDF less diagonal", xlim=(0, 1))
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[:6], labels[:6], fontsize="small")
    return ax


def plot_coverage(*calibrations: Calibration, level: float = 0.95, ax: Any = None) -> Any:
    r"""Expected coverage by level of the region, with simultaneous bands; above the diagonal is too wide.

    Args:
        *calibrations: Of `sbc` (central intervals, a line a parameter) or `tarp` (balls).
        level: Of the bands.
        ax: Matplotlib axes. Omitted: new ones.
    """
    if not calibrations:
        raise ValueError("plot_coverage needs at least one Calibration, got none. Write plot_coverage(sbc(...)).")
    ax = _axes(ax)
    bands = calibrations[0].bands(level)
    points = _array(bands.points)
    low, high = (_array(limit + bands.points) for limit in (bands.lower, bands.upper))
    ax.fill_between(points, low, high, color="0.85", label=f"{level:.0%} of exact ones")
    ax.plot([0, 1], [0, 1], color="0.5", lw=0.6)
    for calibration in calibrations:
        ordered = np.sort(_array(calibration.credibility), axis=0)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        name = "all together (TARP)" if calibration.names == ("tarp",) else "intervals of a parameter"
        for i in range(min(MOST, ordered.shape[1])):
            style = {"color": WARN if calibration.names == ("tarp",) else OURS, "alpha": 0.7}
            ax.step(ordered[:, i], share, where="post", lw=1.0, label=name if i == 0 else None, **style)
    ax.set(xlabel="level of the region", ylabel="truths inside", xlim=(0, 1), ylim=(0, 1))
    ax.legend(fontsize="small", loc="upper left")
    return ax


def plot_history(history: FitHistory, *, ax: Any = None) -> Any:
    r"""Losses of a fit, its residuals on an axis of their own.

    Args:
        history: What ``fit`` returned.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = _axes(ax)
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
        side.semilogy(steps, np.maximum(history.residuals, 1e-300), color="0.6", lw=1.0, label="residual")
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


def plot_modes(audit: ModeAudit, *, ax: Any = None) -> Any:
    r"""Shares of the modes among two populations and the draws, with two standard errors.

    Args:
        audit: Of `mode_audit`.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = _axes(ax)
    series = [
        ("population 1", audit.shares[0], audit.errors[0], "0.55"),
        ("population 2", audit.shares[1], audit.errors[1], "0.75"),
    ]
    if audit.chain_shares is not None and audit.chain_errors is not None:
        series.append(("the draws", audit.chain_shares, audit.chain_errors, OURS))
    width, rows = 0.8 / len(series), np.arange(audit.num_modes)
    for k, (name, shares, errors, colour) in enumerate(series):
        place = rows + (k - (len(series) - 1) / 2) * width
        ax.bar(place, _array(shares), width * 0.92, yerr=2 * _array(errors), color=colour, label=name, capsize=2)
    for k in audit.missing:
        place = (k + (len(series) - 1) / 2 * width, float(audit.shares[:, k].max()) / 2)
        ax.annotate("no draw", place, rotation=90, ha="center", va="center", color=WARN)
    ticks = [f"{k}\n{where}" for k, where in enumerate(audit.where)] if audit.num_modes <= 6 else list(map(str, rows))
    ax.set(xticks=rows, xticklabels=ticks, xlabel="mode", ylabel="share", ylim=(0, 1.3 * float(ax.get_ylim()[1])))
    ax.legend(fontsize="small", ncols=len(series), loc="upper center")
    return ax


def plot_weights(result: PSIS, *, ax: Any = None) -> Any:
    r"""The tail of importance weights: how many draws have a larger weight, on logarithmic axes.

    A line of slope -1/k is a Pareto tail of that k; steeper is better.

    Args:
        result: Of `psis`.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = _axes(ax)
    for name, values, style in (
        ("raw", result.log_weights, {"color": "0.6", "marker": ".", "ls": ""}),
        ("smoothed", result.smoothed, {"color": OURS}),
    ):
        ordered = np.sort(_array(values - values.logsumexp(0)))[::-1]
        ordered = ordered[np.isfinite(ordered)]
        ax.loglog(len(values) * np.exp(ordered), np.arange(1, len(ordered) + 1) / len(values), label=name, **style)
    tail = min(result.num_draws // 5, math.ceil(3 * math.sqrt(result.num_draws)))
    ax.axhline(tail / result.num_draws, color="0.8", lw=0.8, zorder=0)
    title = f"k-hat {result.k_hat:.2f} ({result.reading}), ESS {result.ess / result.num_draws:.0%}"
    ax.set(xlabel="weight / mean weight", ylabel="share of draws above", title=title)
    largest = float(result.num_draws * np.exp(_array(result.smoothed).max()))
    ax.set_xlim(min(1e-2, largest / 10), None)
    ax.legend(fontsize="small")
    return ax


def plot_chains(figures: ChainFigures, *, ax: Any = None) -> Any:
    r"""R-hat against effective sizes, a point a number of the model; the good corner is the lower right.

    Args:
        figures: Of `pyro_sb.diagnostics.chain_figures.chain_figures`.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = _axes(ax)
    for name, ess, marker in (("bulk", figures.ess_bulk, "o"), ("tail", figures.ess_tail, "x")):
        ax.scatter(ess, figures.r_hat, s=18, marker=marker, color=OURS, alpha=0.8, label=f"{name} ESS")
    ax.axhline(1.01, color=WARN, lw=0.8, ls="--")
    ax.axvline(400, color=WARN, lw=0.8, ls="--")
    ax.set(xscale="log", xlabel="effective sample size", ylabel="R-hat")
    top = float(np.nanmax(np.append(figures.r_hat, 1.012)))
    ax.set_ylim(0.998, top + 0.1 * (top - 0.998))
    finite = np.isfinite(figures.r_hat)
    if finite.any():
        i = int(np.where(finite, figures.r_hat, -np.inf).argmax())
        ax.annotate(
            figures.names[i], (figures.ess_bulk[i], figures.r_hat[i]), xytext=(4, 4), textcoords="offset points"
        )
    ax.legend(fontsize="small")
    return ax


def plot_report(report: Report, *, axes: Any = None) -> Any:
    r"""A report's pictures side by side, its verdicts as the headline.

    Args:
        report: Of `report`, `bridge_report`.
        axes: Axes, one a panel. Omitted: a row of new ones.

    Returns:
        An array of axes.
    """
    if not report.panels:
        raise ValueError("the report has no pictures, only lines: print it.")
    made = axes is None
    axes = _row(axes, len(report.panels), height=3.6, width=4.6)
    for ax, panel in zip(axes, report.panels):
        panel.draw(ax)
        if not ax.get_title():
            ax.set_title(panel.title)
    if made:
        figure = axes[0].figure
        figure.suptitle(f"{report.title}: {report.verdict}", color=COLOURS[report.verdict], fontsize="medium")
        trouble = [f"{x.verdict}: {x.name} {x.value}; {x.note}" for x in report.lines if x.verdict in ("look", "bad")]
        if trouble:
            figure.supxlabel("\n".join(trouble[:5]), fontsize="small", ha="left", x=0.02)
    return axes


# ---- parts ----


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    return _pyplot().subplots(layout="constrained")[1]


def _row(axes: Any, num: int, *, height: float = 2.8, width: float = 3.4) -> np.ndarray:
    """An array of as many axes as asked for."""
    if axes is None:
        return np.atleast_1d(_pyplot().subplots(1, num, figsize=(width * num, height), layout="constrained")[1])
    axes = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(axes) < num:
        raise ValueError(
            f"axes must hold at least {num}, one a picture, got {len(axes)}. Write plt.subplots(1, {num})."
        )
    return axes


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib. Write pip install 'pyro-sb[plot]'.") from error
    return plt


def _array(value: Any) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().numpy()


def _updates(history: FitHistory, num: int) -> np.ndarray:
    """When so many evenly spaced checks of a fit were made."""
    return np.linspace(history.iterations / num if num else 0, history.iterations, num)
