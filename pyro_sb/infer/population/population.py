"""A weighted population of an unnormalised target, with its log evidence."""

import logging
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import Evaluations, LogJoint
from pyro_sb.infer.population.mixture_fit import fit_mixture
from pyro_sb.infer.population.rounds import BRIEF, HEAVY_GUARD, LIGHT_GUARD, LONG, Archive, explore
from pyro_sb.infer.population.search import Optima, find_optima
from pyro_sb.infer.population.tempering import temper
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.threads import chosen_threads
from pyro_sb.weights import effective_sample_size, log_evidence, normalise

logger = logging.getLogger(__name__)

FAIR_SHARE = 0.6
"""Effective share above which a mixture is left as it is."""

POOR_SHARE = 0.1
"""Effective share of the population under which it is called poor."""


@dataclass(frozen=True)
class Population:
    r"""Weighted draws of an unnormalised target :math:`p`, drawn from a fitted mixture :math:`\rho`.

    Attributes:
        points: Draws of the proposal, unconstrained. Shape ``(N, d)``.
        log_weights: :math:`\log p - \log \rho` at the points, not normalised. Shape ``(N,)``.
        log_density: :math:`\log p` at the points. Shape ``(N,)``.
        proposal: The mixture :math:`\rho`, normalised: ``core`` and its guard of wide components.
        core: The mixture without its guard.
        log_evidence: Estimate of :math:`\log \int p` from these draws, in nats.
        log_evidence_error: Its standard error, in nats.
        ess_share: Effective sample size over N of importance weights against the proposal, in [0, 1], judged on the
            draws of all rounds.
        num_modes: Distinct maxima found by the search; 0 if there was none or no search.
        funnel: Whether the search ended without a maximum.
        stages: What was done, in order: readable claims with their figures.
        evaluations: Rows of the log joint that it cost, density alone and with gradient.
    """

    points: Tensor
    log_weights: Tensor
    log_density: Tensor
    proposal: StudentMixture
    core: StudentMixture
    log_evidence: float
    log_evidence_error: float
    ess_share: float
    num_modes: int
    funnel: bool
    stages: tuple[str, ...]
    evaluations: Evaluations

    @property
    def weights(self) -> Tensor:
        """Weights that sum to one. Shape ``(N,)``."""
        return normalise(self.log_weights)

    def resample(self, num: int) -> Tensor:
        """Indices of ``num`` draws by weight. Shape ``(num,)``."""
        return torch.multinomial(self.weights, num, replacement=True)


@chosen_threads()
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
) -> Population:
    r"""Weighted population of an unnormalised target, unattended.

    1. A start law: a multi-start Newton search and t-mixtures from the curvature of its maxima; or prior draws; or
       given points.
    2. Importance check of the start law. Only where its effective share is under ``check_share``: adaptively tempered
       SMC.
    3. Refits of the mixture to all weighted draws so far (adaptive multiple importance sampling), until the share is
       good or stops rising.
    4. A brief round of Metropolis-corrected chains, and a refit to their states: they enter regions that no draw of
       the mixture hits, which its share therefore cannot see. Where the share is then under ``fair_share``, or the
       search met no maximum (a funnel), longer rounds follow.

    Args:
        log_joint: Target on the unconstrained vector.
        num_particles: Draws N of a round, at least 50.
        start: ``"search"``, ``"prior"``, or points of shape ``(M, dim)``. A search that ends without a maximum falls
            back to the prior, or to a wide t law if the prior is improper.
        check_share: Effective share in [0, 1] above which the start law needs no tempering.
        fair_share: Effective share in [0, 1] above which chains explore but briefly.
        good_share: Effective share in [0, 1] at which refitting stops.
        max_rounds: Largest number of refits.
        exploring: Whether longer rounds of chains may follow the brief one.
        hints: Points from which the search starts besides its own. Shape ``(M, dim)``.

    Returns:
        The population; a poor one (share under 0.1) comes with a RuntimeWarning that gives the figure.

    References:
        Adaptive multiple importance sampling (Cornuet et al., 2012), https://arxiv.org/abs/0907.1254
    """
    if num_particles < 50:
        raise ValueError(
            f"num_particles must be at least 50 to fit a proposal, got {num_particles}. Write num_particles=1024."
        )
    before = replace(log_joint.evaluations)
    cores, num_modes, stages = _start_laws(log_joint, num_particles, start, hints)
    archive = Archive(log_joint)
    checks = [archive.add(core, num_particles, HEAVY_GUARD) for core in cores]
    share, core = max(checks), cores[checks.index(max(checks))]
    stages.append(f"importance check: effective share {share:.3f}")
    if share < check_share:
        tempered = temper(log_joint, core.with_guard(*HEAVY_GUARD), num_particles)
        stages.append(f"tempered SMC: {tempered.num_levels} levels, log evidence {tempered.log_evidence:.2f}")
        uniform = torch.full_like(tempered.log_density, 1.0 / num_particles)
        core = fit_mixture(tempered.points, uniform, tempered.log_density, max(num_modes, 1))
        archive = Archive(log_joint)
        share = archive.add(core, num_particles, LIGHT_GUARD)
        stages.append(f"fit to the SMC particles: effective share {share:.3f}")
    core = _refit(archive, core, good_share, max_rounds, stages)
    core = explore(archive, core, good_share, stages, BRIEF)
    funnel = isinstance(start, str) and start == "search" and num_modes == 0
    if exploring and (max(archive.shares()) < fair_share or funnel):
        explore(archive, core, good_share, stages, LONG)
    result = _best_round(archive, num_modes, funnel, stages, log_joint.evaluations.since(before))
    logger.info("population: %s", "; ".join(stages))
    if result.ess_share < POOR_SHARE:
        warnings.warn(
            f"The population is poor: its effective share is {result.ess_share:.3f} < {POOR_SHARE} of {num_particles} "
            f"draws. Raise num_particles (now {num_particles}), reparametrise the model, or give points by "
            "start=. A flat prior without data has no normaliser at all.",
            RuntimeWarning,
            stacklevel=3,
        )
    return result


def _start_laws(
    log_joint: LogJoint, num: int, start: str | Tensor, hints: Tensor | None
) -> tuple[list[StudentMixture], int, list[str]]:
    """Candidates for the start law, the number of modes that the search found, and the first stages."""
    if isinstance(start, Tensor):
        points = _checked_points(log_joint, start)
        uniform = torch.full_like(points[:, 0], 1.0 / len(points))
        return [fit_mixture(points, uniform, log_joint.log_prob(points))], 0, [f"start: {len(points)} given points"]
    if start == "prior":
        return [_prior_law(log_joint, num)], 0, ["start: prior draws"]
    if start != "search":
        raise ValueError(f'start must be "search", "prior" or a tensor of points (M, {log_joint.dim}), got {start!r}.')
    optima = find_optima(log_joint, hints=hints)
    if len(optima.points):
        stages = [f"search: {len(optima.points)} maxima from {optima.num_starts} starts"]
        light = laplace_mixture(
            optima, df=30.0, inflation=1.0 + 1.0 / log_joint.dim
        )  # heavy tails cost most at large d
        return [laplace_mixture(optima), light], len(optima.points), stages
    logger.warning("No maximum found from %d starts (a funnel, say): starting wide instead.", optima.num_starts)
    stages = [f"search: no maximum from {optima.num_starts} starts, wide start instead"]
    try:
        return [_prior_law(log_joint, num)], 0, stages
    except (NotImplementedError, ValueError, RuntimeError):
        eye = torch.eye(log_joint.dim, dtype=torch.float64, device=log_joint.device)
        one = eye.new_ones(1)
        return [StudentMixture(one.log(), eye.new_zeros(1, log_joint.dim), 5.0 * eye[None], 5.0 * one)], 0, stages


def laplace_mixture(optima: Optima, df: float = 5.0, inflation: float = 2.25) -> StudentMixture:
    """Mixture of t laws at the maxima: inflated inverse curvatures, Laplace weights of at least .05 / K."""
    share = torch.softmax(optima.log_laplace, 0).clamp_min(0.05 / len(optima.points))
    scales = torch.linalg.cholesky(inflation * torch.linalg.inv(optima.precisions))
    return StudentMixture((share / share.sum()).log(), optima.points, scales, torch.full_like(share, df))


def _prior_law(log_joint: LogJoint, num: int) -> StudentMixture:
    points = log_joint.prior(num).to(torch.float64)
    uniform = torch.full_like(points[:, 0], 1.0 / num)
    return fit_mixture(points, uniform, log_joint.log_prob(points))


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


def _refit(
    archive: Archive, core: StudentMixture, good_share: float, max_rounds: int, stages: list[str]
) -> StudentMixture:
    """Rounds of adaptive multiple importance sampling until the share is good, or fair and no longer rising.

    A round under half the good share doubles the draws of the next, up to four times the first. From the second refit
    on the guard is heavier: a target that the first does not fit has tails that its components miss.
    """
    num, best, share, stale = archive.counts[0], 0.0, 0.0, 0
    for first in (True, *[False] * (max_rounds - 1)):
        enough = max(20.0 * core.locs.shape[-1], 0.05 * len(archive.points))
        weights = normalise(temper_weights(archive.log_weights, enough))
        core = fit_mixture(archive.points, weights, archive.log_density, previous=core)
        share = archive.add(core, num, LIGHT_GUARD if first else HEAVY_GUARD)
        stages.append(f"refit: {core.num_components} components, {num} draws, effective share {share:.3f}")
        stale = stale + 1 if 0.5 * good_share < share < 1.2 * best else 0
        best = max(best, share)
        if share > good_share or stale == 2:
            break
        if share < 0.5 * good_share:
            num = min(2 * num, 4 * archive.counts[0])
    return core


def _best_round(
    archive: Archive, num_modes: int, funnel: bool, stages: list[str], evaluations: Evaluations
) -> Population:
    """The round whose proposal has the largest effective share on all draws: those see what its own may miss."""
    shares = archive.shares()
    best = max(range(len(shares)), key=shares.__getitem__)
    rows = archive.rows(best)
    log_weights = archive.log_density[rows] - archive.log_proposals[best][rows]
    value, error = log_evidence(log_weights)  # of this round alone: its proposal was fitted before its draws
    return Population(
        points=archive.points[rows],
        log_weights=log_weights,
        log_density=archive.log_density[rows],
        proposal=archive.proposals[best],
        core=archive.cores[best],
        log_evidence=value,
        log_evidence_error=error,
        ess_share=shares[best],
        num_modes=num_modes,
        funnel=funnel,
        stages=tuple(stages),
        evaluations=evaluations,
    )


def temper_weights(log_weights: Tensor, enough: float) -> Tensor:
    """Log weights times the largest power in (0, 1] that leaves an effective sample size of at least ``enough``."""
    if effective_sample_size(log_weights) >= enough:
        return log_weights
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effective_sample_size(middle * log_weights) >= enough else (low, middle)
    return torch.where(torch.isneginf(log_weights), log_weights, low * log_weights)  # 0 times -inf would be NaN
