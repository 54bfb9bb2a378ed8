"""Pictures of bridges, fits and diagnostics; each draws into axes that are given or made, and returns them.

Matplotlib is imported when the first picture is drawn. Nothing is shown or saved: that is the caller's.
"""

from pyro_sb.plots.bridges import plot_history, plot_paths
from pyro_sb.plots.calibration import plot_coverage, plot_sbc
from pyro_sb.plots.marginals import plot_marginal, plot_marginals
from pyro_sb.plots.reports import plot_chains, plot_modes, plot_report, plot_weights

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


def __dir__() -> list[str]:
    return sorted(__all__)
