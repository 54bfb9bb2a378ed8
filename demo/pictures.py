"""The demo's three pictures."""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from pyro_sb.datasets import PosteriorTask
from pyro_sb.diagnostics.reports.lines import COLOURS, Report

OURS, NUTS, TRUTH = "tab:blue", "tab:orange", "black"


def draw_schools(task: PosteriorTask, draws: Tensor, path: Path) -> None:
    """Each school's data, and its effect's 90 % interval: ours beside the exact posterior's."""
    sigma, y = (value.numpy() for value in task.args)
    ours, reference = (np.quantile(d[:, :8].numpy(), [0.05, 0.5, 0.95], axis=0) for d in (draws, task.reference_draws))
    rows = np.arange(8)
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    axes.errorbar(
        y, rows, xerr=1.645 * sigma, fmt="o", color="0.75", ms=4, label="the school's own data, 90 % interval"
    )
    for shift, (low, middle, high), colour, label in (
        (-0.16, ours, OURS, f"KernelLangevin, {len(draws):,} draws: posterior median, 90 % interval"),
        (0.16, reference, TRUTH, "exact posterior: the same"),
    ):
        bars = np.stack([middle - low, high - middle])
        axes.errorbar(middle, rows + shift, xerr=bars, fmt="o", color=colour, ms=4, label=label)
    axes.set(yticks=rows, yticklabels=list("ABCDEFGH"), xlabel="effect of coaching, points", ylabel="school")
    axes.set(ylim=(7.6, -0.6), title="Eight schools")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=1, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_modes(task: PosteriorTask, ours: Tensor, nuts: Tensor, path: Path) -> None:
    """Each mode's draws of mu[0] and its share of them; one chain of each sampler. ``ours`` is (chain, draw, 2)."""
    figure = plt.figure(figsize=(9.5, 3.6), layout="constrained")
    left, right, trace = figure.subplots(1, 3, width_ratios=[1, 1, 1.7])
    right.sharey(left)
    for axes, low, high, name in ((left, -3.05, -2.55, "mu[0] < mu[1]"), (right, 2.5, 3.0, "mu[0] > mu[1]")):
        bins = np.linspace(low, high, 26)
        shares = []
        for mu, style in (
            (nuts, {"color": NUTS, "alpha": 0.45, "label": "Pyro's NUTS, one chain"}),
            (ours.flatten(0, 1), {"color": OURS, "alpha": 0.65, "label": f"KernelLangevin, {len(ours)} chains"}),
            (task.reference_draws, {"color": TRUTH, "histtype": "step", "label": "exact draws"}),
        ):
            axes.hist(mu[:, 0].numpy(), bins, weights=np.full(len(mu), 1 / len(mu) / (bins[1] - bins[0])), **style)
            shares.append(float(((mu[:, 0] < mu[:, 1]) == (axes is left)).double().mean()))
        axes.set(xlabel="mu[0]", xlim=(low, high), yticks=[])
        axes.set_title(
            f"share of draws in {name}:\nKernelLangevin {shares[1]:.3f}\nNUTS {shares[0]:.3f} (truth 0.5)", fontsize=9
        )
    left.set_ylabel("density")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=3, frameon=False)
    length = min(100, ours.shape[1], len(nuts))
    trace.plot(ours[0, :length, 0], ".-", color=OURS, lw=0.6, ms=4, label="KernelLangevin, the first of its chains")
    trace.plot(nuts[:length, 0], ".-", color=NUTS, lw=0.6, ms=4, label="Pyro's NUTS")
    trace.set(xlabel="draw", ylabel="mu[0]", ylim=(-3.5, 5.0))
    trace.set_title("one chain of each, draw by draw", fontsize=9)
    trace.legend(fontsize=8, loc="upper right", frameon=False)
    figure.suptitle(
        "Mixture of two Gaussians, its means unordered: the posterior has two modes, more than 100 sds apart",
        fontsize=10,
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_reports(reports: dict[str, Report], path: Path) -> None:
    """Each sampler's report: its lines with their verdicts, and the modes that its audit found."""
    rows = max(len(report.lines) for report in reports.values())
    size = (12.0, (0.9 + 0.23 * rows) * len(reports))
    figure, axes = plt.subplots(len(reports), 2, figsize=size, width_ratios=[3.3, 1], layout="constrained")
    for (name, report), (table, modes) in zip(reports.items(), axes):
        draw_lines(f"{name}, {report.title}: {report.verdict}", report, rows, table)
        report.details["modes"].plot(modes)
        modes.get_legend().remove()
        modes.set(ylim=(0, 1.15), yticks=(0, 0.5, 1))
        modes.tick_params(labelsize=8)
        modes.xaxis.label.set_size(8)
        modes.set_title("mode audit: shares", fontsize=9)
    figure.legend(*modes.get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=3, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_lines(title: str, report: Report, rows: int, axes: Any) -> None:
    """A report's table as text with room for some rows, each verdict in its colour."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(rows - 0.5, -0.8))
    axes.set_title(title, loc="left", fontsize=10, color=COLOURS[report.verdict], weight="bold")
    for row, line in enumerate(report.lines):
        axes.text(0.0, row, line.verdict, color=COLOURS[line.verdict], weight="bold", fontsize=9, va="center")
        note = fill(line.note, 60)
        for column, text, shade in ((0.055, line.name, "black"), (0.2, line.value, "black"), (0.53, note, "0.35")):
            axes.text(column, row, text, color=shade, fontsize=8, va="center", linespacing=1.0)
