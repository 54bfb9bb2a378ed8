"""Pictures of calibration: ranks and coverage, with their simultaneous bands."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_sb.plots.axes import OURS, WARN, Size, array, check_is, one_axes, styled

__all__ = ["plot_coverage", "plot_sbc"]

MOST = 40  # parameters that have room in one picture of coverage
NAMED = 5  # in one legend
REDS, DASHES = (WARN, "#7f0000", "#ff7f0e"), ("-", "--", ":", "-.")


def plot_sbc(
    calibration: Any,
    *,
    level: float = 0.95,
    names: Sequence[str] | None = None,
    ax: Any = None,
    figsize: Size = None,
    **kwargs: Any,
) -> Any:
    r"""Difference of the ranks' ECDF from the diagonal, with simultaneous bands.

    A posterior that is too narrow draws an S that rises first, one too wide falls first, a bias an arch. Parameters
    that leave the bands have reds and dashes of their own; the legend names the five that leave the diagonal most.

    Args:
        calibration: A Calibration, of `sbc`, `tarp` or `Calibration.of`.
        level: Of the bands, for one parameter.
        names: Which parameters. Omitted: all.
        ax: Matplotlib axes. Omitted: new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the lines, for ``ax.plot``.
    """
    check_is("calibration", calibration, "Calibration", "sbc(amortized)")
    ax = one_axes(ax, figsize)
    bands = calibration.bands(level)
    found = calibration.ecdf_difference(bands.points)
    wanted = list(calibration.names) if names is None else list(names)
    unknown = sorted(set(wanted) - set(calibration.names))
    if unknown:
        raise ValueError(f"names must be parameters of the calibration, got {unknown}. Known: {calibration.names}.")
    points = array(bands.points)
    ax.fill_between(points, array(bands.lower), array(bands.upper), color="0.85", label=f"{level:.0%} of exact ones")
    lines = {name: found[:, calibration.names.index(name)] for name in wanted}
    outside = [n for n, y in lines.items() if bool(((y < bands.lower - 1e-9) | (y > bands.upper + 1e-9)).any())]
    outside.sort(key=lambda name: -float(lines[name].abs().max()))
    for name in [name for name in wanted if name not in outside] + outside:
        style = {"color": OURS, "alpha": 0.6}
        if name in outside:
            i = outside.index(name)
            style = {"color": REDS[i % len(REDS)], "ls": DASHES[i % len(DASHES)], "zorder": 3}
            style["label"] = name if i < NAMED else f"and {len(outside) - NAMED} more" if i == NAMED else None
        ax.plot(points, array(lines[name]), **styled(kwargs, "line", linewidth=1.2, **style))
    ax.axhline(0, color="0.5", lw=0.6)
    ax.set(xlabel="rank / (L + 1)", ylabel="ECDF less diagonal", xlim=(0, 1))
    half = len(points) // 2
    left, right = (max(float(y[part].max()) for y in lines.values()) for part in (slice(half), slice(half, None)))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (0.1 + 0.06 * min(len(outside), NAMED + 1)) * (high - low))  # room for the names
    ax.legend(fontsize="small", loc="upper right" if left >= right else "upper left")
    return ax


def plot_coverage(*calibrations: Any, level: float = 0.95, ax: Any = None, figsize: Size = None, **kwargs: Any) -> Any:
    r"""Expected coverage by level of the region, with simultaneous bands.

    Of intervals, a line above the diagonal is too wide, below it too narrow, or biased. Balls of TARP grow from a
    random point, mostly far outside a posterior that is narrow beside its prior, and cross it from one side: their line
    is an S that rises first where the posterior is too narrow, and falls first where it is too wide, as in `plot_sbc`.

    Args:
        *calibrations: Of `sbc` (central intervals, a line a parameter) or `tarp` (balls). Of more than 40 parameters,
            the 40 furthest from the diagonal; the legend says so. Each number of data sets gets its own bands.
        level: Of the bands.
        ax: Matplotlib axes. Omitted: new ones.
        figsize: Of the new figure, in inches.
        **kwargs: Of the lines, for ``ax.plot``.
    """
    if not calibrations:
        raise ValueError("plot_coverage needs at least one Calibration, got none. Write plot_coverage(sbc(...)).")
    for calibration in calibrations:
        check_is("calibrations", calibration, "Calibration", "plot_coverage(sbc(amortized))")
    ax = one_axes(ax, figsize)
    sizes = sorted({len(one.uniforms): one for one in calibrations}.items())
    for i, (size, one) in enumerate(sizes):
        bands = one.bands(level)
        low, high = (array(limit + bands.points) for limit in (bands.lower, bands.upper))
        words = f"{level:.0%} of exact ones" + (f", {size} data sets" if len(sizes) > 1 else "")
        ax.fill_between(array(bands.points), low, high, color=str(0.85 - 0.12 * min(i, 3)), label=words)
    ax.plot([0, 1], [0, 1], color="0.5", lw=0.6)
    for calibration in calibrations:
        ordered = np.sort(array(calibration.credibility), axis=0)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        num, balls = ordered.shape[1], calibration.jointly
        name = "all together (TARP)" if balls else "intervals of a parameter"
        name += f" (the {MOST} worst of {num})" if num > MOST else ""
        name += f", {len(ordered)} data sets" if len(sizes) > 1 else ""
        worst = np.abs(ordered - share[:, None]).max(0).argsort()[::-1][:MOST]
        for i, column in enumerate(sorted(worst)):
            label, colour = name if i == 0 else None, WARN if balls else OURS
            style = styled(kwargs, "line", color=colour, alpha=0.7, linewidth=1.0, label=label)
            ax.step(ordered[:, column], share, where="post", **style)
    ax.set(xlabel="level of the region", ylabel="truths inside", xlim=(0, 1), ylim=(0, 1))
    ax.legend(fontsize="small", loc="upper left")
    return ax
