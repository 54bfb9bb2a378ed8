"""Diagnostics of runs, posteriors and bridges: ArviZ's container, reports, and checks beyond R-hat and ESS."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_sb.diagnostics.calibration.bands import Bands, ecdf_bands, ecdf_p_values
from pyro_sb.diagnostics.calibration.calibration import Calibration, Regions, coverage, sbc, sbc_ranks, tarp
from pyro_sb.diagnostics.calibration.local_classifier import LocalC2ST, local_c2st
from pyro_sb.diagnostics.calibration.simulated import JointDraws, calibration_draws
from pyro_sb.diagnostics.export.container import to_container
from pyro_sb.diagnostics.export.groups import combined, to_groups
from pyro_sb.diagnostics.modes.mode_audit import ModeAudit, mode_audit
from pyro_sb.diagnostics.reports.bridge_report import bridge_report
from pyro_sb.diagnostics.reports.lines import Line, Report
from pyro_sb.diagnostics.reports.psis import PSIS, psis
from pyro_sb.diagnostics.reports.report import report
from pyro_sb.infer.model.run import Run

__all__ = [
    "PSIS",
    "Bands",
    "Calibration",
    "JointDraws",
    "Line",
    "LocalC2ST",
    "ModeAudit",
    "Regions",
    "Report",
    "Run",
    "bridge_report",
    "calibration_draws",
    "coverage",
    "ecdf_bands",
    "ecdf_p_values",
    "local_c2st",
    "mode_audit",
    "psis",
    "report",
    "sbc",
    "sbc_ranks",
    "tarp",
    "to_arviz",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def to_arviz(
    x: Any,
    *,
    log_likelihood: bool = False,
    prior: int | Mapping[str, Tensor] | None = None,
    posterior_predictive: bool | int | Mapping[str, Tensor] | None = None,
    combine: int | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[Hashable]] | None = None,
) -> Any:
    r"""ArviZ's container of a finished run.

    Groups: ``posterior`` and ``sample_stats`` always, ``observed_data`` where there is a model, and on demand
    ``log_likelihood``, ``prior`` with ``prior_predictive``, and ``posterior_predictive``. Every array is
    ``(chain, draw, *shape)`` with the shape that the site has in one run of the model. Dimensions that belong to a
    plate carry its name.

    Args:
        x: A finished ``MCMC``, ours or Pyro's; a conditioned posterior; weighted draws; or a `Run` of draws from
            elsewhere.
        log_likelihood: Log density of each datum at each draw, elementwise over the observed sites' batch shape, as
            ``az.loo`` needs it: 0 where masked, without ``poutine.scale``, ``pyro.factor`` left out, given draws of
            enumerated sites.
        prior: Number of draws to make of the prior, at least 1, or draws of shape ``(num, *site)`` by site.
        posterior_predictive: ``True``: replicated data for each draw. A number: for so many evenly spaced draws of each
            chain. A dict: replicates from elsewhere, such as ``Predictive(model, mcmc.get_samples())(...)``.
        combine: About how many chains to lay the run's end to end into, for plots alone: ``az.plot_trace`` of hundreds
            of chains cannot be read, of ``combine=8`` it can. The number is the divisor of the run's chains that is
            nearest by ratio. R-hat and effective sizes want the chains as they are: leave it out for those, as
            `report` does.
        coords: Labels by dimension. A plate's labels may be given: ``coords={"schools": names}``.
        dims: Dimension names by variable, instead of the plates'.

    Returns:
        ``arviz.InferenceData`` under ArviZ 0.x, ``xarray.DataTree`` under 1.x.

    Raises:
        ImportError: ArviZ is not installed.
        RuntimeError: ``x`` has not run.
        TypeError: ``x`` is no run.
        ValueError: A group cannot be made: no model, latents dropped by ``save_params``, an improper prior; or
            ``combine`` is no whole number of at least 1.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=20, disable_progbar=True)
        >>> mcmc.run(torch.zeros(3))
        >>> to_arviz(mcmc, log_likelihood=True).log_likelihood["y"].dims
        ('chain', 'draw', 'rows')
    """
    made = to_groups(x, log_likelihood=log_likelihood, prior=prior, posterior_predictive=posterior_predictive)
    made = made if combine is None else combined(made, combine)
    return to_container(made.arrays, coords, {**made.dims, **(dims or {})})
