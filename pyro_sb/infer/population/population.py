r"""Weighted population :math:`w = p / \rho` of an unnormalised target :math:`p`, with its log evidence.

Draws of fitted mixtures by adaptive multiple importance sampling, and chains that carry a mixture into regions which
its own draws miss.
"""

import logging
import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import Evaluations, LogJoint
from pyro_sb.infer.model.run import html_table
from pyro_sb.infer.moves.moves import HamiltonianMove, IndexMove, adapted
from pyro_sb.infer.moves.tuning import ChainStates
from pyro_sb.infer.population.mixture_fit import fit_mixture
from pyro_sb.infer.population.search import Optima, find_optima
from pyro_sb.infer.population.tempering import MixtureLaw, temper, within_factor
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.threads import run_by_arguments
from pyro_sb.weights import effective_sample_size, log_evidence, normalise, systematic_resample

__all__ = ["FAIR_SHARE", "POOR_SHARE", "Archive", "Population", "populate", "temper_weights"]

logger = logging.getLogger(__name__)

FAIR_SHARE = 0.6
"""Effective share above which a mixture is left as it is."""

POOR_SHARE = 0.1
"""Effective share of the population under which it is called poor."""

LEAST_ALLOWED = 0.01
"""Share of prior draws under which a start law is not made of them."""

LIGHT_GUARD, HEAVY_GUARD = (0.1, 3.0, 4.0), (0.1, 3.0, 9.0)
"""Share, degrees of freedom and inflation of the wide components that bound the weights in the tails."""


@dataclass(frozen=True, repr=False)
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

    def distinct(self, num: int = 1024) -> tuple[Tensor, Tensor]:
        """At most ``num`` distinct points with weights: systematic draws, their multiplicities as weights.

        Weights with fewer than 50 effective draws are flattened first; that costs acceptance, never exactness.
        """
        enough = min(0.5 * len(self.points), 50.0 + 10.0 * self.points.shape[1])
        weights = normalise(temper_weights(self.log_weights, enough))
        index, counts = systematic_resample(weights, num).unique(return_counts=True)
        return self.points[index], counts.to(self.points.dtype) / num

    def __repr__(self) -> str:
        evaluations = self.evaluations
        modes = f", {self.num_modes} maxima found" if self.num_modes else ""
        lines = [
            f"Population of {len(self.points)} draws in {self.points.shape[1]} dimensions: effective share "
            f"{self.ess_share:.3f}",
            f"  log evidence {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}",
            f"  mixture of {self.core.num_components} component{'s' * (self.core.num_components > 1)}{modes}",
            f"  {evaluations.density} evaluations, {evaluations.gradient} with gradient, in {len(self.stages)} stages:",
        ]
        shown = self.stages if len(self.stages) <= 6 else (*self.stages[:2], "...", *self.stages[-3:])
        return "\n".join([*lines, *(f"    {stage}" for stage in shown)])

    def _repr_html_(self) -> str:
        """Table of the figures and stages."""
        return html_table(
            f"Population of {len(self.points)} draws in {self.points.shape[1]} dimensions",
            [
                ("effective share", f"{self.ess_share:.3f}"),
                ("log evidence", f"{self.log_evidence:.3f} +- {self.log_evidence_error:.3f}"),
                ("components", str(self.core.num_components)),
                ("maxima found", str(self.num_modes)),
                ("evaluations", f"{self.evaluations.density}, {self.evaluations.gradient} with gradient"),
                *((f"stage {i}", stage) for i, stage in enumerate(self.stages, 1)),
            ],
        )


class Archive:
    r"""Draws of T proposals with balance-heuristic weights.

    .. math:: w = p \Big/ \sum_t \frac{N_t}{N} \rho_t

    Every proposal is evaluated at every draw once.

    Args:
        log_joint: Target :math:`\log p`.

    Attributes:
        points: All draws. Shape ``(N, d)``.
        log_density: :math:`\log p` there. Shape ``(N,)``.
        log_proposals: :math:`\log \rho_t` there. Shape ``(T, N)``.
        proposals: The T proposals.
        cores: The same without their guards.
        counts: Draws of each.

    References:
        Optimally combining sampling techniques for Monte Carlo rendering (Veach and Guibas, 1995); Adaptive multiple
        importance sampling (Cornuet et al., 2012), https://arxiv.org/abs/0907.1254
    """

    def __init__(self, log_joint: LogJoint) -> None:
        self.log_joint = log_joint
        self.points = torch.zeros(0, log_joint.dim, dtype=torch.float64, device=log_joint.device)
        self.log_density = self.points.new_zeros(0)
        self.log_proposals = self.points.new_zeros(0, 0)
        self.proposals: list[StudentMixture] = []
        self.cores: list[StudentMixture] = []
        self.counts: list[int] = []

    def add(self, core: StudentMixture, num: int, guard: tuple[float, float, float] | None = None) -> float:
        """Draw ``num`` points of a new proposal; return the effective share of those draws alone.

        The proposal is ``core``, or ``core.with_guard(*guard)``.
        """
        proposal = core if guard is None else core.with_guard(*guard)
        self.cores.append(core)
        points = proposal.sample(num)
        log_density = self.log_joint.log_prob(points)
        here = proposal.log_prob(points)
        earlier = [item.log_prob(points) for item in self.proposals]
        columns = torch.stack([*earlier, here])
        rows = torch.cat([self.log_proposals, proposal.log_prob(self.points)[None]])
        self.points, self.log_density = torch.cat([self.points, points]), torch.cat([self.log_density, log_density])
        self.log_proposals = torch.cat([rows, columns], 1)
        self.proposals.append(proposal)
        self.counts.append(num)
        return effective_sample_size(log_density - here) / num

    @property
    def log_weights(self) -> Tensor:
        """Log of target over the mixture of all proposals, at all draws. Shape ``(N,)``."""
        share = torch.tensor(self.counts, dtype=self.points.dtype, device=self.points.device) / len(self.points)
        return self.log_density - torch.logsumexp(self.log_proposals + share.log()[:, None], 0)

    def rows(self, index: int) -> slice:
        """Rows of the draws of proposal ``index``."""
        start = sum(self.counts[:index])
        return slice(start, start + self.counts[index])

    def shares(self) -> list[float]:
        r"""Effective share :math:`(\int p)^2 / \int p^2 / \rho_t` of every proposal, each judged on all draws."""
        log_weights = self.log_weights
        log_mean = torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
        second = torch.logsumexp(torch.log_softmax(log_weights, 0) + self.log_density - self.log_proposals, 1)
        return torch.exp(log_mean - second).clamp_max(1.0).tolist()


class Effort(NamedTuple):
    """Size of an exploration: chains, steps a round, and the largest number of rounds."""

    num_chains: int
    num_steps: int
    max_rounds: int


BRIEF, LONG = Effort(64, 24, 1), Effort(256, 48, 4)


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
        law = core.with_guard(*HEAVY_GUARD)
        particles = temper(
            MixtureLaw(law),
            log_joint,
            num_particles,
            metric=lambda x, w: within_factor(law, x, w),
            cure="a larger num_particles, or points inside the support by start=",
        )
        points, log_density = particles.points[:, 0], particles.log_density[:, 0]
        stages.append(f"tempered SMC: {particles.num_levels} levels, log evidence {particles.log_evidence[0]:.2f}")
        core = fit_mixture(points, torch.full_like(log_density, 1.0 / num_particles), log_density, max(num_modes, 1))
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
    """Of prior draws; where the data allow almost none of them, of starts that they allow."""
    points = log_joint.prior(num).to(torch.float64)
    log_density = log_joint.log_prob(points)
    if bool(torch.isfinite(log_density).double().mean() < LEAST_ALLOWED):
        points = log_joint.start(num).to(torch.float64)
        log_density = log_joint.log_prob(points)
    uniform = torch.full_like(points[:, 0], 1.0 / num)
    return fit_mixture(points, uniform, log_density)


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


def explore(
    archive: Archive, core: StudentMixture, good_share: float, stages: list[str], effort: Effort
) -> StudentMixture:
    """Rounds of chains and refits, each followed by an importance round, until the share is good.

    The chains alternate Hamiltonian moves whose steps spread over a factor of 30 with jumps of the mixture. Each
    round starts from the states that the last one left.

    Args:
        archive: Draws so far; the new proposals are added.
        core: Mixture to start from.
        good_share: Effective share in [0, 1] at which to stop.
        stages: Report, appended to.
        effort: How much of it.

    Returns:
        The last mixture.
    """
    weights = normalise(archive.log_weights)
    index = torch.multinomial(weights, effort.num_chains, replacement=True)
    batch = ChainStates(archive.points[index], archive.log_density[index])
    step_size = 0.5
    for _ in range(effort.max_rounds):
        move = HamiltonianMove(core, 4, step_size, spread=30.0)
        points, log_density, batch = _run_chains(archive.log_joint, move, batch, effort.num_steps)
        step_size = move.step_size
        uniform = torch.full_like(log_density, 1.0 / len(points))
        core = fit_mixture(points, uniform, log_density, previous=core)
        share = archive.add(core, archive.counts[0], HEAVY_GUARD)
        stages.append(f"exploration: {core.num_components} components, effective share {share:.3f}")
        if share > good_share:
            break
    return core


def _run_chains(
    log_joint: LogJoint, move: HamiltonianMove, batch: ChainStates, num_steps: int
) -> tuple[Tensor, Tensor, ChainStates]:
    """States and log densities that the chains pass through while the step size adapts, and where they end."""
    index = IndexMove(move.mixture.with_guard(*HEAVY_GUARD))
    states = []
    for step in range(num_steps):
        if step % 4 == 3:
            moved = index.step(log_joint, *batch)
        else:
            moved = move.step(log_joint, *batch)
            move.step_size = adapted(move.step_size, moved.accept_prob, move.target_accept, 0.5)
        batch = ChainStates(moved.x, moved.log_density)
        states.append(batch)
    return torch.cat([state.x for state in states]), torch.cat([state.log_density for state in states]), batch
