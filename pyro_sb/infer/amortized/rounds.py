r"""Rounds that sharpen a posterior around some observations: the prior, truncated where the posterior has its mass."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.bridges.light.laws import FixedMixture
from pyro_sb.infer.amortized.latent_law import LatentLaw
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.amortized.prior import log_prior
from pyro_sb.infer.amortized.simulator import Simulations, joined
from pyro_sb.infer.amortized.surprise import whitening
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.warn import warn

__all__ = ["Region", "Round", "sharpened"]

logger = logging.getLogger(__name__)
DRAWS = 10_000  # of a posterior that its region and its moves are read from
CANDIDATES, MOST_CANDIDATES = 20_000, 400_000  # draws that proposals are resampled from
WIDER = 1.5  # factor of the proposal's scales: mixtures are thin where the region ends
LEAST = 200  # pairs that a round learns from, if there are so many
GROWN = 0.8  # share of the prior left in the first region from which rounds save nothing


class Round(NamedTuple):
    """One round of `AmortizedPosterior.sharpen`.

    Attributes:
        num_simulations: Pairs that it learnt from: of those within the region, earlier ones among them, the half whose
            data are nearest to the observations.
        prior_share: Share of the prior that was left in the region.
        effective: Effective number of different parameters among the new ones.
        moved: Largest change of a posterior mean in posterior deviations, or of a log deviation.
        converged: Whether the bridge's held-out loss had settled.
    """

    num_simulations: int
    prior_share: float
    effective: float
    moved: float
    converged: bool


class Region(NamedTuple):
    r"""Highest-density region of posteriors side by side, :math:`\{u: \max_b q(u | y_b) / \tau_b \ge 1\}`.

    Args:
        law: Of the latents given each of B observations.
        log_least: Logarithms of :math:`\tau_b`, the density below which a share of the draws lies. Shape ``(B,)``.
    """

    law: LatentLaw
    log_least: Tensor

    @classmethod
    def of(cls, law: LatentLaw, mass: float) -> "Region":
        """The region that holds a share of each posterior's draws."""
        log_q = law.draws(DRAWS).log_q
        return cls(law, torch.quantile(log_q.double(), 1 - mass, dim=0).to(log_q))

    @torch.no_grad()
    def holds(self, u: Tensor) -> Tensor:
        """Whether latents ``(n, d)`` lie in it. Shape ``(n,)``."""
        num = len(self.log_least)
        parts = [self.law.log_prob(rows[:, None].expand(-1, num, -1)) >= self.log_least for rows in u.split(CANDIDATES)]
        return torch.cat(parts).any(1)


def sharpened(
    posterior: Posterior,
    pairs: Simulations,
    learn: Callable[[Simulations], tuple[Posterior, bool]],
    *,
    num_rounds: int,
    num_simulations: int,
    mass: float,
    tolerance: float,
    keep_finite: bool,
    progress: bool,
) -> Posterior:
    """The posterior after some rounds; options as of `AmortizedPosterior.sharpen`."""
    if not posterior.law.marginal:
        raise NotImplementedError(
            f"rounds need the density of a point, got {posterior.bridge.describe()}, whose draws carry that of their "
            'path. Fit with bridge="light".'
        )
    source, prior, regions, rounds = posterior.simulator, log_prior(posterior.simulator), list[Region](), list[Round]()
    for index in range(num_rounds):
        regions.append(Region.of(posterior.law, mass))
        latents, share, effective = proposals(regions, prior, num_simulations)
        if not index and share > GROWN:
            warn(
                f"the posterior's region holds {share:.0%} of the prior: the data tell little, and rounds would save "
                "nothing. The posterior is returned as it is: raise num_simulations of fit instead.",
            )
            break
        kept = torch.stack([region.holds(pairs.latents) for region in regions]).all(0)
        fresh = source.simulate_at(latents, keep_finite=keep_finite, progress=progress)
        pairs = joined([Simulations(*(rows[kept] for rows in pairs)), fresh])
        near = nearest_rows(pairs.observations, posterior)
        before, (posterior, converged) = posterior, learn(Simulations(*(rows[near] for rows in pairs)))
        change = moved(before, posterior)
        rounds.append(Round(len(near), share, effective, change, converged))
        logger.info("round %d: %s", index + 1, rounds[-1])
        if change < tolerance:
            break
    else:
        if rounds and rounds[-1].moved > 2 * tolerance:
            warn(
                f"the posterior still moved by {rounds[-1].moved:.2g} > {tolerance:g} of its deviations in the last of "
                f"{num_rounds} rounds. Raise num_rounds, or num_simulations (now {num_simulations}).",
            )
    posterior.rounds = tuple(rounds)
    return posterior


def nearest_rows(simulated: Tensor, posterior: Posterior) -> Tensor:
    r"""Rows whose data lie nearest to the observations, by whitened summaries: a half of them.

    A choice by y alone leaves :math:`p(\theta | y)` as it is. Data far from the observations come from parameters
    near the region's edge, which cuts their posteriors: learnt together they made those of the observations too narrow.
    """
    made = posterior.features.columns(simulated.to(posterior.observation.values)).double()
    white = whitening(made)
    given = posterior.features.columns(posterior.observation.values).double() @ white
    distance = torch.cdist(made @ white, given).amin(1)
    return distance.argsort()[: max(len(distance) // 2, LEAST)]


def proposals(regions: list[Region], prior: LogJoint, num: int) -> tuple[Tensor, float, float]:
    r"""Draws of the prior within all regions, by importance resampling from the last posterior, made wider.

    Returns:
        Latents ``(num, d)``, the share of the prior within, :math:`E_q[1_R\, p(u) / q(u)]`, and the effective number.
    """
    law = widened(regions[-1].law)
    batch, points, log_weights = len(regions[-1].log_least), list[Tensor](), list[Tensor]()
    while True:
        u = law.draws(-(-CANDIDATES // batch)).value.flatten(0, 1)
        with torch.no_grad():
            log_q = law.log_prob(u[:, None].expand(-1, batch, -1)).logsumexp(1) - torch.tensor(float(batch)).log()
        log_p = prior.log_prob(u)
        inside = torch.stack([region.holds(u) for region in regions]).all(0) & torch.isfinite(log_p)
        points.append(u)
        log_weights.append(torch.where(inside, (log_p - log_q).double(), -torch.inf))
        everything = torch.cat(log_weights)
        weights = torch.softmax(everything, 0)
        effective = 1 / float(weights.square().sum())
        if effective > 2 * num or len(everything) >= MOST_CANDIDATES:
            break
    share = float((everything.logsumexp(0) - torch.tensor(float(len(everything))).log()).exp())
    index = torch.multinomial(weights, num, replacement=True)
    return torch.cat(points)[index], min(share, 1.0), min(effective, float(num))


def widened(law: LatentLaw) -> LatentLaw:
    """The law with every component's scales larger; as it is where the bridge has no such form."""
    fixed = law.fixed
    if fixed is None:
        return law
    mixture = fixed.law._replace(log_diagonals=fixed.law.log_diagonals - torch.tensor(WIDER).log())
    wide = LatentLaw(law.bridge, law.residuals, law.context, law.features)
    wide.fixed = FixedMixture(mixture, fixed.units)
    return wide


def moved(before: Posterior, after: Posterior) -> float:
    """Largest change of a mean in deviations, or of a log deviation, over latents and observations."""
    old, new = (posterior.law.sample(DRAWS) for posterior in (before, after))
    mean = ((new.mean(0) - old.mean(0)) / new.std(0)).abs().max()
    return float(torch.maximum(mean, (new.std(0) / old.std(0)).log().abs().max()))
