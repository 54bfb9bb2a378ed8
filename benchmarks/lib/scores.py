"""One sampler's run on one posterior, in figures: time, effective sample sizes, agreement with the reference."""

import math
from dataclasses import dataclass

import arviz as az
import numpy as np

from pyro_sb.datasets import PosteriorTask


@dataclass(frozen=True)
class Row:
    """A run's figures; minima and maxima are over the posterior's reference quantities."""

    posterior: str
    sampler: str
    seconds: float  # wall, warm-up (and compilation) counted
    draws: int
    evaluations: int  # of the log joint, with or without its gradient, one a chain
    bulk: float  # smallest bulk ESS
    tail: float  # smallest tail ESS
    rhat: float  # largest
    error: float  # largest |mean - reference| in the reference's standard deviations
    note: str = ""

    @property
    def rate(self) -> float:
        """Bulk ESS a second."""
        return self.bulk / self.seconds

    @property
    def per_thousand(self) -> float:
        """Bulk ESS for 1,000 evaluations."""
        return 1000 * self.bulk / self.evaluations


def score(
    task: PosteriorTask, sampler: str, draws: np.ndarray, seconds: float, evaluations: int, note: str = ""
) -> Row:
    """The row of ``draws``, of shape (chain, draw, p) in the order of ``task.parameters``."""
    chains, length, size = draws.shape
    counts = {"seconds": seconds, "draws": chains * length, "evaluations": evaluations, "note": note}
    draws = draws[:, length % 2 :]
    if length < 20:
        return Row(task.name, sampler, bulk=math.nan, tail=math.nan, rhat=math.nan, error=math.nan, **counts)
    quantities = [draws[:, :, j] for j in range(size)]
    halves = [x if chains > 1 else x.reshape(2, -1) for x in quantities]  # ArviZ has no R-hat for a single chain
    return Row(
        task.name,
        sampler,
        bulk=min(float(az.ess(x, method="bulk")) for x in quantities),
        tail=min(float(az.ess(x, method="tail")) for x in quantities),
        rhat=max(float(az.rhat(x)) for x in halves),
        error=float(np.abs(_standardised(task, draws)).max()),
        **counts,
    )


@dataclass(frozen=True)
class Agreement:
    """One parameter beside the reference."""

    parameter: str
    mean: float
    reference: float
    z: float  # |difference| of the means in combined Monte Carlo standard errors
    sd_ratio: float


def agreement(task: PosteriorTask, draws: np.ndarray) -> list[Agreement]:
    """Each parameter's mean and standard deviation beside the reference. ``draws``: (chain, draw, p)."""
    means, sds = draws.mean((0, 1)), draws.std((0, 1), ddof=1)
    errors = np.array([float(az.mcse(draws[:, :, j], method="mean")) for j in range(draws.shape[-1])])
    combined = np.sqrt(errors**2 + task.reference_mcse.numpy() ** 2)
    z = np.abs(means - task.reference_mean.numpy()) / combined
    ratio = sds / task.reference_sd.numpy()
    reference = task.reference_mean.tolist()
    return [
        Agreement(*row)
        for row in zip(task.parameters, map(float, means), reference, map(float, z), map(float, ratio), strict=True)
    ]


def _standardised(task: PosteriorTask, draws: np.ndarray) -> np.ndarray:
    return (draws.mean((0, 1)) - task.reference_mean.numpy()) / task.reference_sd.numpy()
