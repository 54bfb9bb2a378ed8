"""Metropolis-corrected chains that carry a mixture into regions which its own draws miss."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.archive import HEAVY_GUARD, Archive
from pyro_sb.infer.mixture_fit import fit_mixture
from pyro_sb.infer.moves import HamiltonianMove, IndexMove
from pyro_sb.infer.potential import LogJoint
from pyro_sb.infer.tuning import Batch
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.weights import normalise


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
