r"""Mass-covering fit of a Gaussian mixture, :math:`\min_q KL(p \| q)`, and the better of it and of its ELBO's optimum.

Weighted populations, importance EM, and updates of the ELBO from there.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.autoguide.blocks import differentiable
from pyro_sb.infer.autoguide.law import BlockMixture, MixtureBlock
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.mixture_fit import thinned
from pyro_sb.infer.population.population import Population, honest_evidence
from pyro_sb.infer.population.rounds import LIGHT_GUARD, Archive, temper_weights
from pyro_sb.ops.student_mixture import StudentMixture, em_fit
from pyro_sb.weights import effective_sample_size, normalise, pareto_k

__all__ = ["BlockFit", "fit_block", "polished"]

MAX_ROUNDS, STALE = 8, 2
GAIN = 0.01  # nats of KL(p || q) under which a round brought nothing
TAILS = ((0.03, 1.4), (0.03, 2.2))  # shares and stretches of wider copies
BAD_K = 0.7  # above which weights cannot be trusted
EVEN = 0.98  # effective share above which weights are all but equal, and a tail of theirs is of no consequence
OUTSIDE = 100.0  # nats that a draw outside the support counts below the evidence
CLOSE = 0.005  # nats between ELBO and EUBO that leave nothing to gain
MAX_POINTS = 8192
LEARNING_RATE, BATCH = 0.02, 128


@dataclass(frozen=True)
class BlockFit:
    """A mixture fitted to one block.

    Attributes:
        mixture: Gaussian components.
        log_evidence: Of the block, in nats.
        log_evidence_error: Its standard error.
        population: Where it began.
        stages: What was done.
    """

    mixture: StudentMixture
    log_evidence: float
    log_evidence_error: float
    population: Population
    stages: tuple[str, ...]


def gaussian(mixture: StudentMixture) -> StudentMixture:
    """The same components with normal tails."""
    return mixture._replace(df=torch.full_like(mixture.df, math.inf))


def fit_block(joint: LogJoint, num_particles: int, num_components: int | None, num_updates: int) -> BlockFit:
    """Fit of one target; see `AutoLightBridge.fit`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The population is poor|Tails may be cut")  # the guide's own weights tell
        population = populate(joint, num_particles)
    stages = list(population.stages)
    archive, core = importance_em(joint, population, num_components, stages)
    num = max(4000, 100 * joint.dim)
    fresh = Archive(joint)
    fresh.add(core, num, LIGHT_GUARD)
    rivals = {"fit": core}
    if num_updates and judged(joint, core, fresh).distance > CLOSE:
        value = float(torch.logsumexp(fresh.log_weights, 0)) - math.log(num)
        moved = polished(joint, core, num_updates, value)
        fresh.add(moved, num, LIGHT_GUARD)
        rivals[f"{num_updates} updates of the ELBO"] = moved
        rivals |= {f"the same with tails {tail[1]} times as wide": with_tails(moved, *tail) for tail in TAILS}
    marks = {name: judged(joint, rival, fresh) for name, rival in rivals.items()}
    for name, mark in marks.items():
        stages.append(f"{name}: {rivals[name].num_components} components, {mark.describe()}")
    best = min(marks, key=lambda name: (not marks[name].covers, marks[name].distance))
    value, error = honest_evidence(fresh.log_weights)
    return BlockFit(rivals[best], value, error, population, tuple(stages))


class Mark(NamedTuple):
    """Means of log p - log q under a mixture (ELBO) and under the target (EUBO); k-hat and effective share."""

    elbo: float
    eubo: float
    k_hat: float
    ess_share: float

    @property
    def distance(self) -> float:
        """Sum of both Kullback-Leibler divergences."""
        return self.eubo - self.elbo

    @property
    def covers(self) -> bool:
        """Whether weights of the mixture's draws can be trusted."""
        return self.k_hat <= BAD_K or self.ess_share >= EVEN

    def describe(self) -> str:
        """Its figures."""
        return (
            f"ELBO {self.elbo:.3f}, EUBO {self.eubo:.3f}, k-hat {self.k_hat:.2f}, effective share {self.ess_share:.3f}"
        )


def judged(joint: LogJoint, core: StudentMixture, fresh: Archive, num: int = 4000) -> Mark:
    """A mixture by its own draws, and by weighted draws of frozen proposals."""
    points = core.sample(num)
    ratio = joint.log_prob(points) - core.log_prob(points)
    weights = normalise(fresh.log_weights)
    keep = weights > 0
    upper = weights[keep] @ (fresh.log_density[keep] - core.log_prob(fresh.points[keep]))
    return Mark(float(ratio.mean()), float(upper), pareto_k(ratio), effective_sample_size(ratio) / num)


def with_tails(core: StudentMixture, share: float, stretch: float) -> StudentMixture:
    """The mixture with each component once more, of little weight and a larger scale: still Gaussian, longer tails."""
    return StudentMixture(
        torch.cat([core.log_weights + math.log1p(-share), core.log_weights + math.log(share)]),
        core.locs.repeat(2, 1),
        torch.cat([core.scale_trils, stretch * core.scale_trils]),
        core.df.repeat(2),
    )


def importance_em(
    joint: LogJoint, population: Population, num_components: int | None, stages: list[str]
) -> tuple[Archive, StudentMixture]:
    r"""Rounds of draws, of components where :math:`\log p - \log q` is largest, and of weighted EM."""
    dim = joint.dim
    num = max(2000, 100 * dim)
    archive = Archive(joint)
    archive.adopt(population.points, population.log_density, population.proposal, population.core)
    core = gaussian(population.core)
    core = refined(archive, core, num_components)
    best, best_gap, stale = core, math.inf, 0
    for _ in range(MAX_ROUNDS):
        archive.add(core, num, LIGHT_GUARD)
        gap = _gap(archive, core, num)
        stages.append(f"importance EM: {core.num_components} components, KL(p || q) {gap:.3f}")
        if gap < best_gap - GAIN:
            best, best_gap, stale = core, gap, 0
        else:
            stale += 1
            if stale == STALE:
                break
        core = refined(archive, best if stale else core, num_components)
    return archive, best


def _gap(archive: Archive, core: StudentMixture, num: int) -> float:
    """KL(p || q) by the draws of the last round, which the mixture was not fitted to."""
    points, log_density = archive.points[-num:], archive.log_density[-num:]
    log_weights = log_density - archive.log_proposals[-1, -num:]
    weights = normalise(log_weights)
    value = torch.logsumexp(log_weights, 0) - math.log(num)
    keep = weights > 0
    return float(weights[keep] @ (log_density[keep] - core.log_prob(points[keep]))) - float(value)


def refined(archive: Archive, core: StudentMixture, num_components: int | None) -> StudentMixture:
    """More components where the mixture lacks most, EM, and those dropped that have no draw to themselves."""
    dim = core.locs.shape[1]
    enough = max(20.0 * dim, 0.05 * len(archive.points))
    log_weights = temper_weights(archive.log_weights, enough)
    effective = effective_sample_size(log_weights)
    keep, weights = thinned(normalise(log_weights), MAX_POINTS)
    points, log_density = archive.points[keep], archive.log_density[keep]
    most = int(effective / (2 * (dim + 2))) if num_components is None else num_components
    core = with_more(core, points, weights, log_density, most)
    core = em_fit(points, weights, core, math.inf, 0.5 * (dim + 2))
    heavy = core.log_weights.exp() * effective >= 1.0
    if num_components is not None and int(heavy.sum()) > num_components:
        heavy = torch.zeros_like(heavy).index_fill(0, core.log_weights.topk(num_components).indices, True)
    return StudentMixture(torch.log_softmax(core.log_weights[heavy], 0), *(v[heavy] for v in core[1:]))


def with_more(core: StudentMixture, points: Tensor, weights: Tensor, log_density: Tensor, most: int) -> StudentMixture:
    """Components at points drawn by w (log p - log q - log Z)+, of .7 of the nearest's scale, one unit apart."""
    num = min(max(2, core.num_components // 4), most - core.num_components)
    if num <= 0:
        return core
    excess = log_density - core.log_prob(points)
    excess = (excess - weights @ excess).clamp_min(0.0)
    chance = weights * excess
    if not float(chance.sum()) > 0:
        return core
    index = torch.multinomial(chance, min(4 * num, int((chance > 0).sum())), replacement=False)
    nearest = core.component_log_prob(points[index]).argmax(-1)
    chosen: list[int] = []
    for i, k in zip(index.tolist(), nearest.tolist()):
        apart = [
            torch.linalg.solve_triangular(core.scale_trils[k], (points[i] - points[j])[:, None], upper=False)
            for j in chosen
        ]
        if all(float(a.norm()) > 1.0 for a in apart):
            chosen.append(i)
        if len(chosen) == num:
            break
    places = torch.tensor(chosen, device=points.device)
    near = core.component_log_prob(points[places]).argmax(-1)
    share = torch.full_like(core.log_weights[:1], 1.0 / (core.num_components + len(places))).expand(len(places))
    log_weights = torch.cat([core.log_weights + math.log1p(-float(share.sum())), share.log()])
    return StudentMixture(
        log_weights,
        torch.cat([core.locs, points[places]]),
        torch.cat([core.scale_trils, 0.7 * core.scale_trils[near]]),
        torch.cat([core.df, core.df.new_full((len(places),), math.inf)]),
    )


def polished(joint: LogJoint, core: StudentMixture, num_updates: int, baseline: float) -> StudentMixture:
    """A mixture after that many Adam updates of the ELBO, its means and scales in units of where it began."""
    dim = core.locs.shape[1]
    logits = core.log_weights.clone().requires_grad_()
    shifts = torch.zeros_like(core.locs).requires_grad_()
    stretches = torch.zeros_like(core.scale_trils).requires_grad_()
    places = torch.arange(dim, device=core.locs.device)
    optimiser = torch.optim.Adam([logits, shifts, stretches], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=num_updates, pct_start=0.1)
    for _ in range(num_updates):
        law = BlockMixture([MixtureBlock(places, moved(core, logits, shifts, stretches))], baseline)
        x = law.rsample((max(BATCH, 2 * core.num_components),))
        log_p = differentiable(joint, x)
        parts = law.score_parts(x)
        finite = torch.isfinite(log_p)
        log_r = torch.where(finite, log_p.detach(), parts.log_prob.detach() + baseline - OUTSIDE)
        loss = -(torch.where(finite, log_p, 0.0) - parts.entropy_term + log_r * parts.score_function).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return StudentMixture(*(value.detach() for value in moved(core, logits, shifts, stretches)))


def moved(core: StudentMixture, logits: Tensor, shifts: Tensor, stretches: Tensor) -> StudentMixture:
    r"""A mixture :math:`m_k + L_k \delta_k,\ L_k T_k` about another one: T has the exponential of its diagonal."""
    factor = stretches.tril(-1) + torch.diag_embed(stretches.diagonal(dim1=-2, dim2=-1).exp())
    locs = core.locs + (core.scale_trils @ shifts[..., None])[..., 0]
    return StudentMixture(torch.log_softmax(logits, 0), locs, core.scale_trils @ factor, core.df)
