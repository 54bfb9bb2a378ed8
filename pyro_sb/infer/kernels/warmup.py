r"""Warm-up of a bridge as a proposal: its weights :math:`\pi / q`, the chains' start, and how often it proposes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.infer.mcmc.walk import TUNING_CHAINS, Frozen
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.proposals import ProposalMove, Proposals
from pyro_sb.infer.moves.tuning import ChainStates, Tuned, local_floor, trajectory_range, tune, tune_local
from pyro_sb.infer.population.mixture_fit import fit_mixture
from pyro_sb.infer.population.population import Population
from pyro_sb.infer.population.rounds import temper_weights
from pyro_sb.ops.student_mixture import StudentMixture, within_covariance
from pyro_sb.stages import announce
from pyro_sb.weights import effective_sample_size, log_evidence, normalise, pareto_k

__all__ = ["Pilot", "ChainStart", "freeze_bridge", "judge", "start_of_pilot", "start_of_population"]

LEAST_PROBABILITY = 0.1  # of the bridge's move beside a local one


@dataclass(frozen=True)
class Pilot:
    """Proposals scored by the target.

    Attributes:
        points: Proposals. Shape ``(n, d)``.
        log_density: The target's log density there. Shape ``(n,)``.
        log_weights: Less ``log_q``; minus infinity outside the support. Shape ``(n,)``.
    """

    points: Tensor
    log_density: Tensor
    log_weights: Tensor

    @property
    def share(self) -> float:
        """Effective sample size of the weights over n, in [0, 1]."""
        return effective_sample_size(self.log_weights) / len(self.points)

    @property
    def k_hat(self) -> float:
        """Pareto's k of the weights; above 0.7 they cannot be trusted."""
        return pareto_k(self.log_weights)

    @property
    def log_evidence(self) -> tuple[float, float]:
        """Log evidence and its standard error, in nats."""
        return log_evidence(self.log_weights)


@dataclass(frozen=True)
class ChainStart:
    """Start of the chains and of tuning: weighted points ``(n, d)``, ``(n,)``, and a mixture with their metrics."""

    points: Tensor
    weights: Tensor
    core: StudentMixture | None


def judge(log_joint: LogJoint, proposals: Proposals, num: int) -> Pilot:
    """Score ``num`` proposals."""
    points, log_q = proposals.draws(num)
    log_density = log_joint.log_prob(points)
    finite = torch.isfinite(log_density) & torch.isfinite(log_q)
    return Pilot(points, log_density, torch.where(finite, log_density - log_q, -torch.inf))


def start_of_pilot(pilot: Pilot, *, metric: bool) -> ChainStart:
    """Proposals by weight, flattened to some 50 + 10 d effective ones; with a mixture fitted to them if asked."""
    enough = min(0.5 * len(pilot.points), 50.0 + 10.0 * pilot.points.shape[1])
    weights = normalise(temper_weights(pilot.log_weights, enough))
    core = fit_mixture(pilot.points, weights, pilot.log_density.nan_to_num(neginf=-1e300)) if metric else None
    return ChainStart(pilot.points, weights, core)


def start_of_population(population: Population) -> ChainStart:
    """A population's points and its mixture."""
    return ChainStart(*population.distinct(), population.core)


def freeze_bridge(
    log_joint: LogJoint,
    proposals: Proposals,
    start: ChainStart,
    *,
    local: str | None,
    bridge_probability: float | None,
    num_proposals: int,
) -> Frozen:
    r"""The moves and their probabilities, tuned on states drawn from a start.

    The local move is HMC in the metrics of the start's mixture, as in `KernelLangevin`. It keeps the floor of
    :func:`~pyro_sb.infer.moves.tuning.local_floor`; the rest goes to the move with the larger expected squared jump per
    evaluation, and the bridge keeps at least .1.
    """
    announce("moves")
    index = torch.multinomial(start.weights, TUNING_CHAINS, replacement=True)
    points = start.points[index]
    log_density = log_joint.log_prob(points)
    inside = torch.isfinite(log_density)
    batch = ChainStates(points[inside], log_density[inside])
    move = ProposalMove(proposals, num_proposals)
    if local is None:
        acceptance = math.nan if not len(batch.x) else measured(move, log_joint, batch)
        return Frozen({"bridge": move}, {"bridge": 1.0}, {"bridge": acceptance})
    assert start.core is not None
    scale = torch.linalg.cholesky(within_covariance(start.core, start.points, start.weights))
    bridge, batch = tune(move, log_joint, batch, scale)
    limit, spread = (1, 1.5) if local == "mala" else trajectory_range(bridge.acceptance)
    other, batch = tune_local(start.core, log_joint, batch, scale, max_steps=limit, spread=spread)
    share = share_of_bridge(bridge, other) if bridge_probability is None else bridge_probability
    tuned = {"bridge": bridge, "local": other}
    return Frozen(
        {role: item.move for role, item in tuned.items()},
        {"bridge": share, "local": 1.0 - share},
        {role: item.acceptance for role, item in tuned.items()},
    )


def measured(move: ProposalMove, log_joint: LogJoint, batch: ChainStates, num_steps: int = 6) -> float:
    """Mean acceptance of the bridge's move from given states."""
    rates = []
    for _ in range(num_steps):
        moved = move.step(log_joint, *batch)
        rates.append(float(moved.accept_prob.mean()))
        batch = ChainStates(moved.x, moved.log_density)
    return sum(rates) / num_steps


def share_of_bridge(bridge: Tuned, local: Tuned) -> float:
    """Probability of the bridge's move, from the efficiencies of both and its own acceptance."""
    if bridge.efficiency >= local.efficiency:
        return 1.0 - local_floor(bridge.acceptance)
    return LEAST_PROBABILITY
