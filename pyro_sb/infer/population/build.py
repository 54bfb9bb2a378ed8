r"""How a population is built: regions, a mixture :math:`\rho` that is fitted to them, and its weighted draws.

Regions come from two sources that differ in kind, a search for maxima and particles tempered from the prior; draws of a
mixture that is fitted to both weigh them.
"""

import logging
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.mixture_fit import fit_mixture
from pyro_sb.infer.population.population import POOR_SHARE, Population, honest_evidence
from pyro_sb.infer.population.regions import (
    chosen_proposal,
    improved_regions,
    settled_chains,
    without_maxima,
)
from pyro_sb.infer.population.ridges import follow_ridges
from pyro_sb.infer.population.rounds import (
    BRIEF,
    FAIR_SHARE,
    HEAVY_GUARD,
    LIGHT_GUARD,
    LONG,
    UNCOVERED,
    Archive,
    explore,
    refit,
)
from pyro_sb.infer.population.search import MANY_DIMENSIONS, UNMET, Optima, find_optima
from pyro_sb.infer.population.settle import Settled
from pyro_sb.infer.population.sources import (
    Source,
    affordable,
    laplace_mixture,
    law_of_points,
    pooled,
    scouted,
    screened,
    temper_and_climb,
    wide_mixture,
)
from pyro_sb.infer.population.tempering import MixtureLaw, temper, within_factor
from pyro_sb.infer.population.thrift import Budget
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.threads import run_by_arguments
from pyro_sb.warn import warn

__all__ = ["CUT", "NO_PROPOSAL", "populate"]

logger = logging.getLogger(__name__)

NORMAL = 0.95  # effective share in many dimensions above which Laplace's law is as good as that of chains
KNOWN = 0.05  # standard error of the shares of regions, below which they are known
NO_PROPOSAL = "No mixture serves as a proposal in all dimensions"

CUT = 4.0
"""Nats by which the weights of walking chains exceed those of the draws where tails may be cut."""


@run_by_arguments
def populate(
    log_joint: LogJoint,
    num_particles: int = 1024,
    *,
    start: str | Tensor = "search",
    check_share: float = 0.2,
    fair_share: float = FAIR_SHARE,
    good_share: float = 0.8,
    max_rounds: int = 5,
    exploring: bool = True,
    hints: Tensor | None = None,
    near: StudentMixture | None = None,
    budget: float | None = None,
) -> Population:
    r"""Weighted population of an unnormalised target, unattended.

    1. Two sources of regions: Newton ascents of many starts, and particles tempered from the prior to the posterior
       (where it is improper, from a law wider than what the search met), from which ascents start again. A few
       particles scout; where there are several maxima, or none, or a single normal law does not fit, as many as it
       takes to fit all regions.
    2. A mixture of t laws, from the curvature of the maxima or fitted to both sources, and refits to its own weighted
       draws (adaptive multiple importance sampling), until the effective share is good or stops rising.
    3. A walk of Metropolis-corrected chains. Where their states have larger weights than the draws of the mixture, they
       have entered regions that no draw hits, which its share cannot see: a refit, and longer walks.
       Above 20 dimensions, instead of 2 and 3: chains that settle in each region, normal laws fitted to their draws and
       gradients, mixtures along the one or two directions in which a region is not normal, jumps between regions, and
       chains from wide starts, which find regions without a maximum.
    4. Fresh draws of the best mixture, which is frozen by then: evidence and its error rest on them alone.

    Args:
        log_joint: Target on the unconstrained vector.
        num_particles: Draws N of a round, at least 50; the number of tempered particles follows it.
        start: ``"search"`` for both sources, ``"prior"`` for the second alone, or points of shape ``(M, dim)``.
        check_share: Effective share in [0, 1] above which given points need no tempering.
        fair_share: Effective share in [0, 1] above which a mixture serves as it is; under half of it chains walk long.
        good_share: Effective share in [0, 1] at which refitting stops.
        max_rounds: Largest number of refits.
        exploring: Whether ridges are followed where the mixture at the maxima does not fit, and longer walks may follow
            the brief one.
        hints: Points from which the search starts besides its own. Shape ``(M, dim)``.
        near: Normal laws where the target is known to lie, where chains start if the search meets no maximum.
        budget: Rows of the log joint, a gradient counting 2.5, after which nothing more is begun that may be left out:
            tempering of all particles, ridges, refits, walks. None: no bound. What was left out is said.

    Returns:
        The population. A poor one (share under 0.1), and one whose walk still met what its draws miss, comes with a
        RuntimeWarning.

    References:
        Adaptive multiple importance sampling (Cornuet et al., 2012), https://arxiv.org/abs/0907.1254
    """
    if num_particles < 50:
        raise ValueError(
            f"num_particles must be at least 50 to fit a proposal, got {num_particles}. Write num_particles=1024."
        )
    before = replace(log_joint.evaluations)
    archive, stages, purse = Archive(log_joint), list[str](), Budget(log_joint, budget)
    if isinstance(start, Tensor):
        beginning = _from_points(archive, num_particles, start, check_share, stages)
    elif start == "prior":
        beginning = _from_prior(archive, num_particles, stages)
    elif start == "search":
        beginning = _from_both(
            archive, num_particles, hints, near, fair_share if exploring else 0.0, fair_share, stages, purse
        )
    else:
        raise ValueError(f'start must be "search", "prior" or a tensor of points (M, {log_joint.dim}), got {start!r}.')
    funnel = isinstance(start, str) and start == "search" and beginning.num_modes == 0
    settled = beginning.settled if log_joint.dim > MANY_DIMENSIONS else None
    jump = None
    if settled is None:
        excess = _improved(
            archive, beginning.core, good_share, fair_share, max_rounds, exploring, funnel, stages, purse
        )
    else:
        settled, jump, excess = improved_regions(archive, settled, good_share, num_particles, stages, purse)
    best, share = chosen_proposal(archive, settled)
    points, log_weights, log_density = _frozen(archive, best, num_particles)
    value, error = honest_evidence(log_weights)
    result = Population(
        points=points,
        log_weights=log_weights,
        log_density=log_density,
        proposal=archive.proposals[best],
        core=archive.cores[best],
        log_evidence=value,
        log_evidence_error=error,
        ess_share=share,
        num_modes=beginning.num_modes,
        funnel=funnel,
        stages=(*stages, *purse.describe()),
        evaluations=log_joint.evaluations.since(before),
        sources=beginning.sources,
        excess=excess,
        rare=beginning.rare,
        settled=settled,
        jump=jump,
    )
    logger.info("population: %s", "; ".join(stages))
    purse.say(result.ess_share)
    _warn(result, num_particles, flat=log_joint.prototype is None or bool(log_joint.prototype.improper))
    return result


def _improved(
    archive: Archive,
    core: StudentMixture,
    good_share: float,
    fair_share: float,
    max_rounds: int,
    exploring: bool,
    funnel: bool,
    stages: list[str],
    purse: Budget,
) -> float:
    """Refits and walks, until the mixture serves; by how many nats the weights of walking chains exceed its own."""
    if purse.allows("refits"):
        core = refit(archive, core, good_share, max_rounds, stages)
    if not purse.allows("walks"):
        return 0.0
    core, excess = explore(archive, core, fair_share, stages, BRIEF)
    poor = max(archive.shares()) < 0.5 * fair_share
    if exploring and (poor or funnel or excess > UNCOVERED) and purse.allows("longer walks"):
        walk = LONG if poor or funnel else LONG._replace(max_rounds=2)
        _, excess = explore(archive, core, fair_share, stages, walk)
    return excess


class Beginning(NamedTuple):
    """A first mixture, the number of maxima met, what the sources did, and the evidence in maxima met seldom."""

    core: StudentMixture
    num_modes: int = 0
    sources: tuple[Source, ...] = ()
    rare: float = 0.0
    settled: Settled | None = None


def _from_both(
    archive: Archive,
    num: int,
    hints: Tensor | None,
    near: StudentMixture | None,
    bent_share: float,
    fair_share: float,
    stages: list[str],
    purse: Budget,
) -> Beginning:
    """The search, a scout of tempered particles, and where one normal law does not fit, as many as it takes.

    Ridges are followed where the effective share is under ``bent_share``.
    """
    joint = archive.log_joint
    optima = find_optima(joint, hints=hints)
    search = Source("search", optima.num_starts, maxima=len(optima.points))
    stages.append(search.describe())
    if search.maxima > 1 and purse.allows("screening"):
        optima, done = screened(joint, optima)
        rare = f"; {optima.rare:.1%} of the evidence in maxima met three times or less" if optima.rare > UNMET else ""
        stages.append(f"screened {done} points: {len(optima.points) - search.maxima} more maxima{rare}")
    found = scouted(joint, optima, num, purse.left)
    core, share = _laplace(archive, found.optima, num, stages)
    settled, before = None, share
    if core is not None and share < (NORMAL if joint.dim > MANY_DIMENSIONS else fair_share):
        settled, share = settled_chains(archive, laplace_mixture(found.optima, df=math.inf, inflation=1.0), num, stages)
    elif core is None and joint.dim > MANY_DIMENSIONS:
        law = law_of_points(found.particles.points[:, 0]) if near is None and found.particles is not None else near
        if law is not None:
            settled, share = settled_chains(archive, law, num, stages)
    if settled is not None and (joint.dim > MANY_DIMENSIONS or share > before):
        core = settled.core
    share = max(share, before)
    many = settled is not None and joint.dim > MANY_DIMENSIONS
    if core is not None and not many and share < bent_share and purse.allows("ridges"):
        core, share = _ridges(archive, laplace_mixture(found.optima, inflation=1.0), num, stages)
    full = affordable(joint, False, num)
    several = len(found.optima.points) > 1 and full.num > found.effort.num
    if found.effort != full and (several or (share < fair_share and not many)) and purse.allows("all particles"):
        stages.append(found.source.describe())
        found = temper_and_climb(joint, found.optima, full)
        if found.source.new:
            core, share = _at_maxima(archive, found.optima, num, 0.0 if many else bent_share, stages)
        if found.source.new and many:
            laws = laplace_mixture(found.optima, df=math.inf, inflation=1.0)
            settled, share = settled_chains(archive, laws, num, stages)
    stages.append(found.source.describe())
    if core is not None and joint.dim > MANY_DIMENSIONS and purse.allows("chains from wide starts"):
        settled = without_maxima(archive, settled, found, num, stages)
        many = settled is not None
    if found.particles is not None and share < fair_share and not many:
        pool = pooled(joint, found.law, found.particles, core, num)
        core = fit_mixture(*pool, num_components=max(1, len(found.optima.points)), previous=core)
        share = archive.add(core, num, LIGHT_GUARD)
        stages.append(f"fit to both: {core.num_components} components, effective share {share:.3f}")
        if share < bent_share and not len(found.optima.points):
            core, share = _ridges(archive, core, num, stages)
    if core is None:
        core = wide_mixture(joint)
        archive.add(core, num, HEAVY_GUARD)
    return Beginning(core, len(found.optima.points), (search, found.source), found.optima.rare, settled)


def _at_maxima(
    archive: Archive, optima: Optima, num: int, bent_share: float, stages: list[str]
) -> tuple[StudentMixture | None, float]:
    """A mixture at the maxima, continued along ridges where it does not fit, and its effective share."""
    core, share = _laplace(archive, optima, num, stages)
    if core is None or share >= bent_share:
        return core, share
    return _ridges(archive, laplace_mixture(optima, inflation=1.0), num, stages)


def _ridges(archive: Archive, frames: StudentMixture, num: int, stages: list[str]) -> tuple[StudentMixture, float]:
    """The best mixture so far, judged on all draws, once pieces have followed ridges from the middles of frames."""
    pieces = follow_ridges(archive.log_joint, frames.locs, frames.scale_trils, num)
    if pieces is not None:
        share = archive.add(pieces, num, LIGHT_GUARD)
        stages.append(f"followed ridges: {pieces.num_components} pieces, effective share {share:.3f}")
    best = archive.best
    return archive.cores[best], archive.shares()[best]


def _laplace(archive: Archive, optima: Optima, num: int, stages: list[str]) -> tuple[StudentMixture | None, float]:
    """The better of a heavy and a light mixture at the maxima, with its effective share; None and 0 without maxima."""
    if not len(optima.points):
        return None, 0.0
    light = laplace_mixture(optima, df=30.0, inflation=1.0 + 1.0 / archive.points.shape[1])
    cores = [laplace_mixture(optima), light]  # heavy tails cost most in many dimensions
    checks = [archive.add(core, num, HEAVY_GUARD) for core in cores]
    share = max(checks)
    stages.append(f"importance check of {len(optima.points)} maxima: effective share {share:.3f}")
    return cores[checks.index(share)], share


def _from_prior(archive: Archive, num: int, stages: list[str]) -> Beginning:
    """Tempered particles alone, and a mixture fitted to them."""
    joint = archive.log_joint
    joint.prior(1)  # says why where there is none
    found = temper_and_climb(joint, None, affordable(joint, False, num))
    stages.append(found.source.describe())
    if found.particles is None:
        raise ValueError(found.source.failure)
    core = fit_mixture(*pooled(joint, found.law, found.particles, None, 0))
    share = archive.add(core, num, LIGHT_GUARD)
    stages.append(f"fit to the particles: {core.num_components} components, effective share {share:.3f}")
    return Beginning(core, 0, (found.source,))


def _from_points(archive: Archive, num: int, start: Tensor, check_share: float, stages: list[str]) -> Beginning:
    """A mixture fitted to given points; tempered from it where its effective share is poor."""
    points = _checked_points(archive.log_joint, start)
    core = fit_mixture(points, torch.full_like(points[:, 0], 1.0 / len(points)), archive.log_joint.log_prob(points))
    share = archive.add(core, num, HEAVY_GUARD)
    stages += [f"start: {len(points)} given points", f"importance check: effective share {share:.3f}"]
    if share < check_share:
        law = core.with_guard(*HEAVY_GUARD)
        cure = "a larger num_particles, or points inside the support by start="
        metric = partial(within_factor, law)
        particles = temper(MixtureLaw(law), archive.log_joint, num, metric=metric, cure=cure)
        stages.append(f"tempered: {particles.num_levels} levels, log evidence {particles.log_evidence[0]:.2f}")
        log_density = particles.log_density[:, 0]
        core = fit_mixture(particles.points[:, 0], torch.full_like(log_density, 1.0 / num), log_density)
        archive.clear()
        share = archive.add(core, num, LIGHT_GUARD)
        stages.append(f"fit to the particles: effective share {share:.3f}")
    return Beginning(core)


def _checked_points(log_joint: LogJoint, points: Tensor) -> Tensor:
    if points.ndim != 2 or points.shape[1] != log_joint.dim or len(points) < 4:
        raise ValueError(
            f"start points must be at least 4 rows of shape (M, {log_joint.dim}), got {tuple(points.shape)}. "
            "Give more rows, or drop start=."
        )
    points = points.to(log_joint.device, torch.float64)
    if not bool(torch.isfinite(points).all()):
        raise ValueError("start points must be finite, got NaN or infinite entries. Drop those rows.")
    if bool((points == points[0]).all(0).any()):
        raise ValueError(
            "start points must differ in every coordinate, got a constant one. Spread them, or drop start=."
        )
    return points


def _frozen(archive: Archive, index: int, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh draws of a mixture, with their log weights and log densities: it was fixed before them."""
    proposal = archive.proposals[index]
    points = proposal.sample(num)
    log_density = archive.log_joint.log_prob(points)
    return points, log_density - proposal.log_prob(points), log_density


def _warn(result: Population, num: int, flat: bool) -> None:
    """What follows for the result where a population is poor or a walk left it; ``flat``: the prior may be improper."""
    shares_known = result.jump is not None and float(result.jump.shares.error.max()) < KNOWN
    one = result.settled is not None and result.settled.core.num_components == 1
    if result.ess_share < POOR_SHARE and (one or shares_known):
        warn(
            f"{NO_PROPOSAL}: its effective share is {result.ess_share:.3f} < {POOR_SHARE} of {num} draws. Its weights "
            f"and log evidence are poor; chains that start here are exact, only slower. Raise num_particles ({num})."
        )
    elif result.ess_share < POOR_SHARE:
        infinite = " A flat prior without data has no normaliser at all." if flat else ""
        warn(
            f"The population is poor: its effective share is {result.ess_share:.3f} < {POOR_SHARE} of {num} draws. "
            f"Shares of modes and tails may be off. Raise num_particles (now {num}).{infinite}"
        )
    elif result.excess > CUT:
        warn(
            f"Tails may be cut: walking chains met weights {result.excess:.1f} nats above those of the draws (at most "
            f"{CUT:g} are harmless), and chains that start here reach those regions slowly. Raise num_particles (now "
            f"{num}), and run long."
        )
