"""All draws of adaptive multiple importance sampling, weighted against the mixture of their proposals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import HamiltonianMove, IndexMove
from pyro_sb.infer.moves.tuning import Batch
from pyro_sb.infer.population.mixture_fit import fit_mixture
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.weights import effective_sample_size, normalise

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


# Metropolis-corrected chains that carry a mixture into regions which its own draws miss


class Effort(NamedTuple):
    """Size of an exploration: chains, steps a round, and the largest number of rounds."""

    num_chains: int
    num_steps: int
    max_rounds: int


BRIEF, LONG = Effort(64, 24, 1), Effort(256, 48, 4)


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
    batch = Batch(archive.points[index], archive.log_density[index])
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
    log_joint: LogJoint, move: HamiltonianMove, batch: Batch, num_steps: int
) -> tuple[Tensor, Tensor, Batch]:
    """States and log densities that the chains pass through while the step size adapts, and where they end."""
    index = IndexMove(move.mixture.with_guard(*HEAVY_GUARD))
    states = []
    for step in range(num_steps):
        if step % 4 == 3:
            moved = index.step(log_joint, *batch)
        else:
            moved = move.step(log_joint, *batch)
            move.step_size *= math.exp(0.5 * (float(moved.accept_prob.mean()) - move.target_accept))
        batch = Batch(moved.x, moved.log_density)
        states.append(batch)
    return torch.cat([state.x for state in states]), torch.cat([state.log_density for state in states]), batch
