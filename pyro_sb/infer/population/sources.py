r"""The second source of regions: particles tempered from the prior, :math:`p(z)\, p(y | z)^\beta`, and what they hold.

A search meets what its starts lead to; particles that move from the prior to the posterior meet regions by their mass.
The two differ in kind, so each sees what the other misses. Particles find regions. They are not weighed by their own
evidence, whose error is that of a few ancestors: draws of a mixture fitted to both sources weigh them.
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.distributions import Draws
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.search import (
    MANY_DIMENSIONS,
    NUMBERS,
    UNMET,
    Optima,
    climb,
    empty_optima,
    prior_draws,
    relevant,
)
from pyro_sb.infer.population.tempering import MixtureLaw, Particles, PointLaw, neighbour_factor, temper
from pyro_sb.infer.population.thrift import thrifty
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.stages import announce

__all__ = [
    "Effort",
    "Source",
    "affordable",
    "laplace_mixture",
    "law_of_points",
    "pooled",
    "scouted",
    "screened",
    "temper_and_climb",
    "wide_mixture",
]

logger = logging.getLogger(__name__)
FEWEST, MOST = 128, 4096  # particles
FIRST_SCOUTS, NEAR = 256, 16  # in many dimensions, and temperatures up to which more of them are worth while
SCOUTS = 32  # particles where a run of the model runs over much data
AFFORDABLE = 2**13  # particles of a model of no size
NUM_CLIMBERS, CLIMBERS_A_ROW = 128, 2**13  # particles of the largest residuals, and as many of all; fewer in long runs
MAX_CLIMBS = 4
WIDE = (3.0, 16.0)  # degrees of freedom and inflation of the start law where there is no prior to draw
MBAR_STEPS = 20
SCREENED, MAX_SCREENS = 2**17, 8  # points of a round that are screened for further modes, and rounds
CHUNK = 2**14


class Effort(NamedTuple):
    """Particles, share of them that a level keeps effective, sweeps a level and leapfrog steps a sweep."""

    num: int
    ess_share: float
    sweeps: int
    num_steps: int


def affordable(joint: LogJoint, least: bool, num_particles: int = 1024) -> Effort:
    """A scout of few sweeps, or all that is needed to weigh regions; fewer particles where a run of the model is long.

    Args:
        joint: The target.
        least: Whether a scout is enough.
        num_particles: Size of the population: more or fewer than 1,024 ask for more or fewer here, in proportion.
    """
    scale = num_particles / 1024
    num = 2 ** round(math.log2(scale * AFFORDABLE / (1 + joint.run_size / NUMBERS)))
    most = round(scale * MOST)
    num = min(most, max(thrifty(joint, FEWEST, SCOUTS), num))
    return Effort(num, 0.3, 2, 2) if least and num < most else Effort(num, 0.5, 3, 4)


class PriorLaw:
    """A model's prior on the unconstrained vector, with its density and gradient: where tempering starts."""

    def __init__(self, joint: LogJoint) -> None:
        self.joint, self.density = joint, joint.without_data()

    def draws(self, num: int) -> Draws:
        """Draws ``(num, 1, d)`` with their log density ``(num, 1)``."""
        z = self.joint.prior(num).to(torch.float64)
        return Draws(z[:, None], self.density.log_prob(z)[:, None])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient. ``(N, 1, d)`` to ``(N, 1)`` and ``(N, 1, d)``."""
        value, grad = self.density.value_and_grad(u[:, 0])
        return value[:, None], grad[:, None]


def prior_law(joint: LogJoint) -> PriorLaw | None:
    """The prior as a start law; None where it cannot be drawn, or runs of the model cannot be batched."""
    if joint.prototype is None or joint.prototype.improper:
        return None
    try:
        law = PriorLaw(joint)
        value = law.draws(8).log_q
    except (NotImplementedError, ValueError, RuntimeError) as error:
        logger.info("the prior cannot be drawn: %s", error)
        return None
    return law if bool(torch.isfinite(value).any()) and law.density.route != "loop" else None


def laplace_mixture(optima: Optima, df: float = 5.0, inflation: float = 2.25) -> StudentMixture:
    """Mixture of t laws at the maxima: inflated inverse curvatures, Laplace weights of at least .05 / K."""
    share = torch.softmax(optima.log_laplace, 0).clamp_min(0.05 / len(optima.points))
    scales = torch.linalg.cholesky(inflation * torch.linalg.inv(optima.precisions))
    return StudentMixture((share / share.sum()).log(), optima.points, scales, torch.full_like(share, df))


def law_of_points(x: Tensor) -> StudentMixture:
    """A normal law with the mean and the variances of points ``(M, d)``."""
    one = x.new_ones(1)
    scale = torch.diag(x.std(0, correction=0).clamp_min(1e-12))
    return StudentMixture(one.log(), x.mean(0, keepdim=True), scale[None], math.inf * one)


def wide_mixture(joint: LogJoint) -> StudentMixture:
    """A t law as wide as the starts of a search: where nothing else is known."""
    eye = torch.eye(joint.dim, dtype=torch.float64, device=joint.device)
    one = eye.new_ones(1)
    return StudentMixture(one.log(), eye.new_zeros(1, joint.dim), 5.0 * eye[None], 5.0 * one)


def widest(joint: LogJoint, optima: Optima) -> StudentMixture:
    """As wide as the starts of a search, five times as wide, and wider than the maxima that are known."""
    usual = wide_mixture(joint)
    parts = [usual, usual._replace(scale_trils=5 * usual.scale_trils, df=torch.full_like(usual.df, WIDE[0]))]
    parts += [laplace_mixture(optima, *WIDE)] if len(optima.points) else []
    log_weights = torch.cat([part.log_weights - math.log(len(parts)) for part in parts])
    return StudentMixture(log_weights, *(torch.cat(values) for values in list(zip(*parts, strict=True))[1:]))


@dataclass(frozen=True)
class Source:
    """What a source of regions did.

    Attributes:
        name: ``"search"``, ``"prior"`` or ``"wide law"``, the law that particles were tempered from.
        num: Starts, or particles at every temperature.
        maxima: Distinct maxima known after it.
        new: Of them, those that were not known before it.
        num_levels: Temperatures.
        exponent: Of the likelihood that the particles reached: 1 unless the budget ended before.
        failure: Why there are no particles; empty where there are.
        instead: Why particles did not start from a prior that can be drawn; empty where they did, or it cannot.
    """

    name: str
    num: int
    maxima: int = 0
    new: int = 0
    num_levels: int = 0
    exponent: float = 1.0
    failure: str = ""
    instead: str = ""

    @property
    def capacity(self) -> float:
        """Share of the particles that a region must hold at some temperature to be met: 3 / N; 0 for a search."""
        return 3.0 / self.num if self.num_levels else 0.0

    def describe(self) -> str:
        """A stage: what was done, with its figures."""
        if self.failure:
            return f"no second source: {self.failure}"
        if self.name == "search":
            return f"search: {self.maxima or 'no'} maxim{'um' if self.maxima <= 1 else 'a'} from {self.num} starts"
        return (
            f"tempered from the {self.name}: {self.num} particles, {self.num_levels} temperatures"
            + (f", unfinished at exponent {self.exponent:.3g}" if self.exponent < 1 else "")
            + f", {self.new} more maxima; a region that holds under {self.capacity:.1g} of the particles at every "
            "temperature may be missed" + (f". Not from the prior: {self.instead}" if self.instead else "")
        )


class Tempered(NamedTuple):
    """All maxima, and the particles that led to some of them, with the law that they started from."""

    optima: Optima
    particles: Particles | None
    law: PointLaw
    effort: Effort
    source: Source


def scouted(joint: LogJoint, optima: Optima, num_particles: int, rows: float | None = None) -> Tempered:
    """A scout of particles; in many dimensions a small one first, and all of it where the prior is not far.

    Where no more than so many rows may be spent, it is smaller: a particle takes about 300.
    """
    effort = affordable(joint, True, num_particles)
    if rows is not None and rows < 300 * effort.num:
        effort = Effort(min(effort.num, max(FEWEST, round(rows / 300))), 0.3, 2, 2)
    if joint.dim <= MANY_DIMENSIONS or effort.num <= FIRST_SCOUTS:
        return temper_and_climb(joint, optima, effort)
    first = temper_and_climb(joint, optima, Effort(FIRST_SCOUTS, 0.3, 2, 2))
    if not 0 < first.source.num_levels <= NEAR:
        return first
    found = temper_and_climb(joint, first.optima, effort)
    new = max(0, len(found.optima.points) - len(optima.points))  # of both
    return found._replace(source=replace(found.source, new=new))


def temper_and_climb(joint: LogJoint, optima: Optima | None, effort: Effort) -> Tempered:
    """Particles tempered from the prior, or from a wide law where it cannot be drawn, and ascents from them.

    Args:
        joint: The target.
        optima: Maxima that are known; None for particles alone, without ascents.
        effort: How many.
    """
    announce("tempering")
    known = empty_optima(joint) if optima is None else optima
    last = MixtureLaw(widest(joint, known))
    laws: list[tuple[str, PointLaw | None]] = [("prior", prior_law(joint)), ("wide law", last)]
    failure = ""
    for name, law in laws:
        if law is None:
            continue
        try:
            particles = tempered(joint, law, effort)
        except ValueError as error:  # too few draws of the law in the support
            failure = failure or str(error)
            continue
        more = known if optima is None else residual_search(joint, known, *particles.visited())
        source = Source(
            name,
            effort.num,
            len(more.points),
            max(0, len(more.points) - len(known.points)),
            particles.num_levels,
            float(particles.levels[-1].exponent[0]),
            instead=failure,
        )
        return Tempered(more, particles, law, effort, source)
    return Tempered(known, None, last, effort, Source("wide law", effort.num, len(known.points), failure=failure))


def tempered(joint: LogJoint, law: PointLaw, effort: Effort) -> Particles:
    """Particles of every temperature between a start law and the target."""
    return temper(
        law,
        joint,
        effort.num,
        metric=neighbour_factor,
        ess_share=effort.ess_share,
        sweeps=effort.sweeps,
        num_steps=effort.num_steps,
        spread=8.0,
        forgetting=0.2,
        keep_levels=True,
        cure="points inside the support by start=",
    )


def residual_search(joint: LogJoint, optima: Optima, points: Tensor, log_density: Tensor) -> Optima:
    r"""Maxima that are known, and those above points where :math:`\log p - \log\rho` is largest.

    One point in the basin of a maximum is enough. The mixture :math:`\rho` is Laplace's, with normal tails, which show
    what lies between known modes, and with heavy ones. Ascents are repeated while they meet maxima that were not known.

    Args:
        joint: The target.
        optima: Maxima that are known.
        points: Where it has been evaluated. Shape ``(M, d)``.
        log_density: The log joint there. Shape ``(M,)``.
    """
    points, log_density = (values[torch.isfinite(log_density)] for values in (points, log_density))
    num = round(min(NUM_CLIMBERS, max(thrifty(joint, 16, 4), CLIMBERS_A_ROW / joint.run_size)))
    for _ in range(MAX_CLIMBS):
        before = len(optima.points)
        some = torch.randint(len(points), (num,), device=points.device)
        high = [r.topk(min(num, len(r))).indices for r in _residuals(optima, points, log_density)]
        chosen = torch.cat([some, *high]).unique()
        optima = relevant(climb(joint, optima, points[chosen]))
        if len(optima.points) <= before and (not before or optima.unmet < UNMET):
            break
    return optima


def _residuals(optima: Optima, points: Tensor, log_density: Tensor) -> list[Tensor]:
    if not len(optima.points):
        return [log_density]
    mixtures = laplace_mixture(optima), laplace_mixture(optima, df=math.inf, inflation=1.0)
    return [log_density - torch.cat([m.log_prob(part) for part in points.split(CHUNK)]) for m in mixtures]


def screened(joint: LogJoint, optima: Optima) -> tuple[Optima, int]:
    """More maxima, above those of many scattered points where the target exceeds the Laplace mixture most.

    An ascent costs some hundred evaluations, so that screening by density meets basins that are a hundred times
    smaller. The points are prior draws at several scales, or draws of a law wider than the maxima, and draws of the
    normal law that the maxima themselves spread over. Rounds follow while they meet more.

    Returns:
        All maxima, and how many points were screened.
    """
    size = max(FEWEST, round(SCREENED / (1 + joint.run_size / NUMBERS)))
    done = 0
    for _ in range(MAX_SCREENS):
        known = len(optima.points)
        points = torch.cat([_scattered(joint, optima, size // 2), _between(optima, size - size // 2)])
        log_density = torch.cat([joint.log_prob(part) for part in points.split(CHUNK)])
        optima, done = residual_search(joint, optima, points, log_density), done + size
        if len(optima.points) <= known and not optima.rare > UNMET:
            break
    return optima, done


def _scattered(joint: LogJoint, optima: Optima, num: int) -> Tensor:
    """Prior draws times scales from a quarter to 2; where there is no prior, draws of a wide law."""
    z = prior_draws(joint, min(num, MOST))
    if z is None:
        return widest(joint, optima).sample(num)
    centre, index = z.mean(0), torch.randint(len(z), (2, num), device=z.device)
    turn = 2 * math.pi * torch.rand(num, 1, dtype=z.dtype, device=z.device)  # more draws of the same covariance
    pair = turn.cos() * (z[index[0]] - centre) + turn.sin() * (z[index[1]] - centre)
    return centre + 2.0 ** (1 - 3 * torch.rand_like(turn)) * pair


def _between(optima: Optima, num: int) -> Tensor:
    """Draws of the normal law that the maxima spread over, once and twice as wide."""
    spread = optima.points - optima.points.mean(0)
    index = torch.randn(num, len(spread), dtype=spread.dtype, device=spread.device)
    within = 2 * spread.std(0) * torch.randn(num, spread.shape[1], dtype=spread.dtype, device=spread.device)
    wide = 1 + torch.randint(2, (num, 1), device=spread.device)
    return optima.points.mean(0) + wide * (0.7 * index @ spread / math.sqrt(len(spread)) + 0.35 * within)


class Sample(NamedTuple):
    """A weighted sample of the target: points ``(M, d)``, weights that sum to one and log densities ``(M,)``."""

    points: Tensor
    weights: Tensor
    log_density: Tensor


def pooled(joint: LogJoint, law: PointLaw, particles: Particles, start: StudentMixture | None, num: int) -> Sample:
    r"""Particles of all temperatures and draws of a mixture, as one sample of the target.

    .. math:: w = p \Big/ \Big(\sum_l n_l \frac{q^{1 - \beta_l} p^{\beta_l}}{Z_l} + n\,\rho\Big)

    with evidences :math:`Z_l` that solve the equations of the multistate Bennett acceptance ratio. For fitting only:
    shares of regions have the particles' own errors.

    Args:
        joint: The target p.
        law: Start law q of the particles.
        particles: With their levels.
        start: The mixture :math:`\rho`, or None.
        num: Its draws n.

    References:
        Statistically optimal analysis of samples from multiple equilibrium states (Shirts and Chodera, 2008),
        https://arxiv.org/abs/0801.1426
    """
    levels = particles.levels
    points = torch.cat([level.points[:, 0] for level in levels])
    log_start = torch.cat([level.log_start[:, 0] for level in levels])
    log_density = torch.cat([level.log_density[:, 0] for level in levels])
    counts = [len(level.points) for level in levels]
    if start is not None:
        more = start.sample(num)
        points = torch.cat([points, more])
        log_start = torch.cat([log_start, law.value_and_grad(more[:, None])[0][:, 0]])
        log_density = torch.cat([log_density, joint.log_prob(more)])
    finite = torch.isfinite(log_density)
    points, log_start, log_density = points[finite], log_start[finite], log_density[finite]
    exponent = torch.stack([level.exponent[0] for level in levels])[:, None]
    states = exponent * log_density + torch.where(exponent < 1, (1 - exponent) * log_start, 0.0)
    log_evidence = torch.stack([level.log_evidence[0] for level in levels])
    if start is not None:
        states = torch.cat([states, start.log_prob(points)[None]])
        log_evidence, counts = torch.cat([log_evidence, log_evidence.new_zeros(1)]), [*counts, num]
    share = log_density.new_tensor(counts).log()[:, None]
    for _ in range(MBAR_STEPS):
        total = torch.logsumexp(share + states - log_evidence[:, None], 0)
        log_evidence = torch.logsumexp(states - total, 1)
        log_evidence = log_evidence - log_evidence[0]  # the start law is normalised
        if start is not None:
            log_evidence[-1] = 0.0
    total = torch.logsumexp(share + states - log_evidence[:, None], 0)
    return Sample(points, torch.softmax(log_density - total, 0), log_density)
