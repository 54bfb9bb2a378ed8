"""Pictures of runs and weights: modes, importance weights, convergence, and a whole report."""

import math
from textwrap import fill
from typing import Any

import numpy as np

from pyro_sb.plots.axes import OURS, WARN, Size, array, check_is, one_axes, row_of_axes, styled

__all__ = ["plot_chains", "plot_modes", "plot_report", "plot_weights"]

ENOUGH = 400  # effective draws
MOST = 6  # modes whose places have room below the axis
LETTERS = 14  # of small type to an inch


def plot_modes(audit: Any, *, ax: Any = None, figsize: Size = None, **kwargs: Any) -> Any:
    r"""Shares of the modes among the populations and the draws, with two standard errors.

    Args:
        audit: A ModeAudit, of `mode_audit`.
        ax: Matplotlib axes. Omitted: new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the bars, for ``ax.bar``.
    """
    check_is("audit", audit, "ModeAudit", "mode_audit(draws, model, args=(y,))")
    ax = one_axes(ax, figsize)
    names = ["the population"] if len(audit.shares) == 1 else ["population 1", "population 2"]
    series = list(zip(names, audit.shares, audit.errors, ("0.55", "0.75")))
    if audit.chain_shares is not None and audit.chain_errors is not None:
        series.append(("the draws", audit.chain_shares, audit.chain_errors, OURS))
    width, rows = 0.8 / len(series), np.arange(audit.num_modes)
    for k, (name, shares, errors, colour) in enumerate(series):
        place = rows + (k - (len(series) - 1) / 2) * width
        style = {"width": 0.92 * width, "capsize": 2, **styled(kwargs, "patch", color=colour, label=name)}
        ax.bar(place, array(shares), yerr=2 * array(errors), **style)
    ticks, below = list(map(str, rows)), "mode"
    if audit.num_modes <= MOST:
        ticks = ["\n".join([str(k), *(f"{value:.3g}" for _, value in at)]) for k, at in enumerate(audit.differing)]
        below = f"mode, and {', '.join(name for name, _ in audit.differing[0])} there"
    top = 1.3 * float(ax.get_ylim()[1])  # the legend is above the bars
    shown = [tick for tick in ax.get_yticks() if 0 <= tick <= min(1.0, top)]
    ax.set(xticks=rows, xticklabels=ticks, xlabel=below, ylabel="share", ylim=(0, top), yticks=shown)
    for k in audit.missing:
        whisker = 2 * float(array(series[-1][2])[k])
        foot = (k + (len(series) - 1) / 2 * width, whisker + 0.02 * top)
        ax.annotate("no draw", foot, rotation=90, ha="center", va="bottom", color=WARN)
    ax.legend(fontsize="small", ncols=len(series), loc="upper center", columnspacing=1.0, handlelength=1.0)
    return ax


def plot_weights(result: Any, *, ax: Any = None, figsize: Size = None, **kwargs: Any) -> Any:
    r"""The tail of importance weights: how many draws have a larger weight, on logarithmic axes.

    A line of slope -1/k is a Pareto tail of that k; steeper is better.

    Args:
        result: A PSIS, of `psis`.
        ax: Matplotlib axes. Omitted: new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the smoothed weights' line, for ``ax.plot``.
    """
    check_is("result", result, "PSIS", "psis(log_weights)")
    ax = one_axes(ax, figsize)
    for values, style in (
        (result.log_weights, {"color": "0.6", "marker": ".", "ls": "", "label": "raw"}),
        (result.smoothed, styled(kwargs, "line", color=OURS, label="smoothed")),
    ):
        ordered = np.sort(array(values - values.logsumexp(0)))[::-1]
        ordered = ordered[np.isfinite(ordered)]
        ax.loglog(len(values) * np.exp(ordered), np.arange(1, len(ordered) + 1) / len(values), **style)
    tail = min(result.num_draws // 5, math.ceil(3 * math.sqrt(result.num_draws)))
    ax.axhline(tail / result.num_draws, color="0.8", lw=0.8, zorder=0)
    title = f"k-hat {result.k_hat:.2f} ({result.reading}), ESS {result.ess / result.num_draws:.0%}"
    ax.set(xlabel="weight / mean weight", ylabel="share of draws above", title=title)
    largest = float(result.num_draws * np.exp(array(result.smoothed).max()))
    ax.set_xlim(min(1e-2, largest / 10), None)
    ax.legend(fontsize="small")
    return ax


def plot_chains(figures: Any, *, ax: Any = None, figsize: Size = None, **kwargs: Any) -> Any:
    r"""R-hat against effective sizes, a point a number of the model; the good corner is the lower right.

    Args:
        figures: ChainFigures, of `pyro_sb.diagnostics.export.container.chain_figures`.
        ax: Matplotlib axes. Omitted: new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the points, for ``ax.scatter``.
    """
    check_is("figures", figures, "ChainFigures", "chain_figures(to_arviz(mcmc))")
    ax = one_axes(ax, figsize)
    for name, ess, marker in (("bulk", figures.ess_bulk, "o"), ("tail", figures.ess_tail, "x")):
        style = styled(kwargs, "points", color=OURS, alpha=0.8, label=f"{name} ESS")
        ax.scatter(ess, figures.r_hat, **{"s": 18, "marker": marker, **style})
    ax.axhline(1.01, color=WARN, lw=0.8, ls="--")
    ax.axvline(ENOUGH, color=WARN, lw=0.8, ls="--")
    ax.set(xscale="log", xlabel="effective sample size", ylabel="R-hat")
    top = float(np.nanmax(np.append(figures.r_hat, 1.012)))
    ax.set_ylim(0.998, top + 0.1 * (top - 0.998))
    _number_decades(ax)
    finite = np.isfinite(figures.r_hat)
    if finite.any():
        i = int(np.where(finite, figures.r_hat, -np.inf).argmax())
        _name_point(ax, figures.names[i], float(figures.ess_bulk[i]), float(figures.r_hat[i]))
    ax.legend(fontsize="small")
    return ax


def _number_decades(ax: Any) -> None:
    """Plain numbers on a logarithmic axis, few enough to be read; `ENOUGH` is one of them on a short axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    subs = (1.0, 2.0, 4.0) if high < 10**1.5 * low else (1.0,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _name_point(ax: Any, name: str, x: float, y: float) -> None:
    """A name beside its point, on the side that has room."""
    low, high = ax.get_xlim()
    right = x > math.sqrt(low * high)
    side = {"ha": "right", "xytext": (-4, 4)} if right else {"ha": "left", "xytext": (4, 4)}
    ax.annotate(name, (x, y), textcoords="offset points", annotation_clip=True, **side)


def plot_report(report: Any, *, axes: Any = None, figsize: Size = None) -> Any:
    r"""A report's pictures side by side, its verdicts as the headline.

    Args:
        report: A Report, of `report`, `bridge_report`.
        axes: Axes, one a panel. Omitted: a row of new ones.
        figsize: Of the new figure, in inches.

    Returns:
        An array of axes.
    """
    check_is("report", report, "Report", "report(mcmc)")
    if not report.panels:
        raise ValueError("the report has no pictures, only lines: print it.")
    made = axes is None
    axes = row_of_axes(axes, len(report.panels), figsize=figsize, height=3.6, width=4.6)
    for ax, panel in zip(axes, report.panels):
        panel.draw(ax)
        if not ax.get_title():
            ax.set_title(panel.title)
    if made:
        figure = axes[0].figure
        figure.suptitle(f"{report.title}: {report.verdict}", color=report.colour, fontsize="medium")
        trouble = [f"{x.verdict}: {x.name} {x.value}; {x.note}" for x in report.lines if x.verdict in ("look", "bad")]
        if trouble:
            wide = int(LETTERS * figure.get_size_inches()[0])
            said = "\n".join(fill(line, wide, subsequent_indent="    ") for line in trouble[:5])
            figure.supxlabel(said, fontsize="small", ha="left", x=0.02)
    return axes
