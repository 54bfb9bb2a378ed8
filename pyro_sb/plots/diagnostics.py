"""Pictures of diagnostics: calibration, modes, weights, chains, and a whole report."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_sb.diagnostics.calibration import Calibration
from pyro_sb.diagnostics.chain_figures import ChainFigures
from pyro_sb.diagnostics.lines import COLOURS, Report
from pyro_sb.diagnostics.mode_audit import ModeAudit
from pyro_sb.diagnostics.psis import PSIS
from pyro_sb.plots.axes import OURS, WARN, array, one_axes, row_of_axes

__all__ = ["plot_chains", "plot_coverage", "plot_modes", "plot_report", "plot_sbc", "plot_weights"]

MOST = 40  # parameters that have room in one picture


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
    ax = one_axes(ax)
    bands = calibration.bands(level)
    found = calibration.ecdf_difference(bands.points)
    wanted = list(calibration.names) if names is None else list(names)
    unknown = sorted(set(wanted) - set(calibration.names))
    if unknown:
        raise ValueError(f"names must be parameters of the calibration, got {unknown}. Known: {calibration.names}.")
    points = array(bands.points)
    ax.fill_between(points, array(bands.lower), array(bands.upper), color="0.85", label=f"{level:.0%} of exact ones")
    for name in wanted:
        line = found[:, calibration.names.index(name)]
        outside = bool(((line < bands.lower - 1e-9) | (line > bands.upper + 1e-9)).any())
        style = {"color": WARN, "label": name, "zorder": 3} if outside else {"color": OURS, "alpha": 0.6}
        ax.plot(points, array(line), lw=1.2, **style)
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
    ax = one_axes(ax)
    bands = calibrations[0].bands(level)
    points = array(bands.points)
    low, high = (array(limit + bands.points) for limit in (bands.lower, bands.upper))
    ax.fill_between(points, low, high, color="0.85", label=f"{level:.0%} of exact ones")
    ax.plot([0, 1], [0, 1], color="0.5", lw=0.6)
    for calibration in calibrations:
        ordered = np.sort(array(calibration.credibility), axis=0)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        name = "all together (TARP)" if calibration.names == ("tarp",) else "intervals of a parameter"
        for i in range(min(MOST, ordered.shape[1])):
            style = {"color": WARN if calibration.names == ("tarp",) else OURS, "alpha": 0.7}
            ax.step(ordered[:, i], share, where="post", lw=1.0, label=name if i == 0 else None, **style)
    ax.set(xlabel="level of the region", ylabel="truths inside", xlim=(0, 1), ylim=(0, 1))
    ax.legend(fontsize="small", loc="upper left")
    return ax


def plot_modes(audit: ModeAudit, *, ax: Any = None) -> Any:
    r"""Shares of the modes among two populations and the draws, with two standard errors.

    Args:
        audit: Of `mode_audit`.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = one_axes(ax)
    series = [
        ("population 1", audit.shares[0], audit.errors[0], "0.55"),
        ("population 2", audit.shares[1], audit.errors[1], "0.75"),
    ]
    if audit.chain_shares is not None and audit.chain_errors is not None:
        series.append(("the draws", audit.chain_shares, audit.chain_errors, OURS))
    width, rows = 0.8 / len(series), np.arange(audit.num_modes)
    for k, (name, shares, errors, colour) in enumerate(series):
        place = rows + (k - (len(series) - 1) / 2) * width
        ax.bar(place, array(shares), width * 0.92, yerr=2 * array(errors), color=colour, label=name, capsize=2)
    for k in audit.missing:
        middle = (k + (len(series) - 1) / 2 * width, float(audit.shares[:, k].max()) / 2)
        ax.annotate("no draw", middle, rotation=90, ha="center", va="center", color=WARN)
    ticks = (
        [str(k) + "\n" + where.replace(", ", "\n") for k, where in enumerate(audit.where)]
        if audit.num_modes <= 6
        else list(map(str, rows))
    )
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
    ax = one_axes(ax)
    for name, values, style in (
        ("raw", result.log_weights, {"color": "0.6", "marker": ".", "ls": ""}),
        ("smoothed", result.smoothed, {"color": OURS}),
    ):
        ordered = np.sort(array(values - values.logsumexp(0)))[::-1]
        ordered = ordered[np.isfinite(ordered)]
        ax.loglog(len(values) * np.exp(ordered), np.arange(1, len(ordered) + 1) / len(values), label=name, **style)
    tail = min(result.num_draws // 5, math.ceil(3 * math.sqrt(result.num_draws)))
    ax.axhline(tail / result.num_draws, color="0.8", lw=0.8, zorder=0)
    title = f"k-hat {result.k_hat:.2f} ({result.reading}), ESS {result.ess / result.num_draws:.0%}"
    ax.set(xlabel="weight / mean weight", ylabel="share of draws above", title=title)
    largest = float(result.num_draws * np.exp(array(result.smoothed).max()))
    ax.set_xlim(min(1e-2, largest / 10), None)
    ax.legend(fontsize="small")
    return ax


def plot_chains(figures: ChainFigures, *, ax: Any = None) -> Any:
    r"""R-hat against effective sizes, a point a number of the model; the good corner is the lower right.

    Args:
        figures: Of `pyro_sb.diagnostics.chain_figures.chain_figures`.
        ax: Matplotlib axes. Omitted: new ones.
    """
    ax = one_axes(ax)
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
    axes = row_of_axes(axes, len(report.panels), height=3.6, width=4.6)
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
