r"""Importance rounds of fitted mixtures, :math:`w = p / \rho`: each refits the mixture to all weighted draws so far."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import HamiltonianMove, IndexMove, adapted
from pyro_sb.infer.moves.tuning import ChainStates
from pyro_sb.infer.population.mixture_fit import fit_mixture
from pyro_sb.infer.population.thrift import thrifty
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.stages import announce
from pyro_sb.weights import effective_sample_size, log_evidence, normalise

__all__ = [
    "BRIEF",
    "FAIR_SHARE",
    "HEAVY_GUARD",
    "LIGHT_GUARD",
    "LONG",
    "UNCOVERED",
    "Archive",
    "explore",
    "refit",
    "temper_weights",
]

FAIR_SHARE = 0.6
"""Effective share above which a mixture is left as it is."""

LIGHT_GUARD, HEAVY_GUARD = (0.1, 3.0, 4.0), (0.1, 3.0, 9.0)
"""Share, degrees of freedom and inflation of the wide components that bound the weights in the tails."""


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
        self.clear()

    def clear(self) -> None:
        """Forget all draws."""
        log_joint = self.log_joint
        self.points = torch.zeros(0, log_joint.dim, dtype=torch.float64, device=log_joint.device)
        self.log_density = self.points.new_zeros(0)
        self.log_proposals = self.points.new_zeros(0, 0)
        self.proposals: list[StudentMixture] = []
        self.cores: list[StudentMixture] = []
        self.counts: list[int] = []

    def add(
        self,
        core: StudentMixture,
        num: int,
        guard: tuple[float, float, float] | None = None,
        proposal: StudentMixture | None = None,
    ) -> float:
        """Draw ``num`` points of a new proposal; return the effective share of those draws alone.

        The proposal is the given one, ``core.with_guard(*guard)``, or ``core``.
        """
        if proposal is None:
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

    def adopt(self, points: Tensor, log_density: Tensor, proposal: StudentMixture, core: StudentMixture) -> None:
        """Take draws ``(N, d)`` of a proposal that were made elsewhere, with their log densities, as the first."""
        self.clear()
        self.points, self.log_density = points, log_density
        self.log_proposals = proposal.log_prob(points)[None]
        self.proposals, self.cores, self.counts = [proposal], [core], [len(points)]

    @property
    def log_weights(self) -> Tensor:
        """Log of target over the mixture of all proposals, at all draws. Shape ``(N,)``."""
        share = torch.tensor(self.counts, dtype=self.points.dtype, device=self.points.device) / len(self.points)
        return self.log_density - torch.logsumexp(self.log_proposals + share.log()[:, None], 0)

    def rows(self, index: int) -> slice:
        """Rows of the draws of proposal ``index``."""
        start = sum(self.counts[:index])
        return slice(start, start + self.counts[index])

    @property
    def best(self) -> int:
        """Proposal of the largest effective share on all draws: those see what its own may miss."""
        shares = self.shares()
        return max(range(len(shares)), key=shares.__getitem__)

    def served(self, index: int, points: Tensor, log_density: Tensor) -> float:
        r"""Effective share of a proposal, judged on its own draws and on states of chains: the smaller of the two.

        In many dimensions draws of other proposals lie where neither the target nor this one has mass, and judge it
        by that. At states of the target the share is :math:`Z / E_p[p / \rho]`; the largest half a per cent of the
        weights there is left out: a single state that has not settled would decide.
        """
        rows = self.rows(index)
        own = self.log_density[rows] - self.log_proposals[index][rows]
        theirs = (log_density - self.proposals[index].log_prob(points)).sort().values
        theirs = theirs[: len(theirs) - len(theirs) // 200]
        at_states = log_evidence(own)[0] - (torch.logsumexp(theirs, 0) - math.log(len(theirs)))
        return min(effective_sample_size(own) / len(own), float(torch.exp(at_states)), 1.0)

    def weights_beyond(self, index: int, points: Tensor, log_density: Tensor) -> Tensor:
        r"""Log weights :math:`p / (Z \rho)` of given points under a proposal, Z by its own draws. ``(M,)``."""
        rows = self.rows(index)
        evidence = log_evidence(self.log_density[rows] - self.log_proposals[index][rows])[0]
        return log_density - self.proposals[index].log_prob(points) - evidence

    def excess(self, points: Tensor, log_density: Tensor, index: int | None = None) -> float:
        """By how many nats the upper weights of given states exceed those of draws, under a proposal or the best one.

        The 99.9 % quantile against the largest draw, or the evidence and a nat more if that is larger.
        """
        best = self.best if index is None else index
        theirs = torch.quantile((log_density - self.proposals[best].log_prob(points))[: 2**24], 0.999)
        log_weights = self.log_density[self.rows(best)] - self.log_proposals[best][self.rows(best)]
        return float(theirs - torch.maximum(log_weights.max(), log_evidence(log_weights)[0] + 1.0 + 0 * theirs))

    def shares(self) -> list[float]:
        r"""Effective share :math:`(\int p)^2 / \int p^2 / \rho_t` of every proposal, each judged on all draws."""
        log_weights = self.log_weights
        log_mean = torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
        second = torch.logsumexp(torch.log_softmax(log_weights, 0) + self.log_density - self.log_proposals, 1)
        return torch.exp(log_mean - second).clamp_max(1.0).tolist()


class Exploration(NamedTuple):
    """Size of an exploration: chains, steps a round, and the largest number of rounds."""

    num_chains: int
    num_steps: int
    max_rounds: int


BRIEF, LONG = Exploration(128, 24, 1), Exploration(256, 48, 4)
UNCOVERED = 1.0  # nats by which the weights of walking chains may exceed those of the draws


def refit(
    archive: Archive,
    core: StudentMixture,
    good_share: float,
    max_rounds: int,
    stages: list[str],
    fair_share: float = FAIR_SHARE,
) -> StudentMixture:
    """Rounds of adaptive multiple importance sampling, until the share is good or stops rising.

    It ends where the share did not rise, once where it is fair and else twice.
    A round under half the good share doubles the draws of the next, up to four times the first. From the second refit
    on the guard is heavier: a target that the first does not fit has tails that its components miss.
    """
    announce("mixture rounds")
    num, best, share, stale = archive.counts[0], max(archive.shares()), 0.0, 0
    for first in (True, *[False] * (max_rounds - 1)):
        enough = max(20.0 * core.locs.shape[-1], 0.05 * len(archive.points))
        weights = normalise(temper_weights(archive.log_weights, enough))
        core = fit_mixture(archive.points, weights, archive.log_density, previous=core)
        share = archive.add(core, num, LIGHT_GUARD if first else HEAVY_GUARD)
        stages.append(f"refit: {core.num_components} components, {num} draws, effective share {share:.3f}")
        stale = stale + 1 if share < 1.2 * best else 0
        best = max(best, share)
        if share > good_share or stale == 2 or (stale and best > fair_share):
            break
        if share < 0.5 * good_share:
            num = min(2 * num, 4 * archive.counts[0])
    return core


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
    archive: Archive, core: StudentMixture, fair_share: float, stages: list[str], walk: Exploration
) -> tuple[StudentMixture, float]:
    r"""Rounds of chains that enter regions which no draw of the mixture hits; refits to their states where they do.

    The chains alternate Hamiltonian moves whose steps spread over a factor of 30 with jumps of the mixture. Each round
    starts from the states that the last one left. A round ends the exploration where its states have no larger weights
    :math:`p / \rho` than the draws of the mixture have, and the share is good or this is the brief walk.

    Args:
        archive: Draws so far; the new proposals are added.
        core: Mixture to start from.
        fair_share: Effective share in [0, 1] at which to stop where the states meet nothing new.
        stages: Report, appended to.
        walk: How much of it.

    Returns:
        The last mixture, and by how many nats the states of the last round exceeded the weights of the draws.
    """
    announce("walk")
    weights, joint = normalise(archive.log_weights), archive.log_joint
    walk = walk._replace(num_chains=thrifty(joint, walk.num_chains, 32), num_steps=thrifty(joint, walk.num_steps, 12))
    index = torch.multinomial(weights, walk.num_chains, replacement=True)
    batch = ChainStates(archive.points[index], archive.log_density[index])
    step_size, excess = 0.5, 0.0
    for first in (True, *[False] * (walk.max_rounds - 1)):
        if not first and excess < UNCOVERED and max(archive.shares()) > fair_share:
            break
        move = HamiltonianMove(core, 4, step_size, spread=30.0)
        points, log_density, batch = _run_chains(archive.log_joint, move, batch, walk.num_steps)
        step_size, excess = move.step_size, archive.excess(points, log_density)
        if excess < UNCOVERED and not (first and walk.max_rounds > 1 and max(archive.shares()) < fair_share):
            stages.append(f"walk: {walk.num_chains} chains met nothing that the mixture misses")
            break
        uniform = torch.full_like(log_density, 1.0 / len(points))
        chain = torch.arange(len(points), device=points.device) % walk.num_chains
        core = fit_mixture(points, uniform, log_density, previous=core, groups=chain)
        share = archive.add(core, archive.counts[0], HEAVY_GUARD)
        stages.append(
            f"walk: weights of the states exceed those of the draws by {excess:.1f} nats; refit of "
            f"{core.num_components} components, effective share {share:.3f}"
        )
    return core, excess


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
