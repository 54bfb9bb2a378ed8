r"""Expected squared jump per evaluation, :math:`\min_i E[(L^{-1} \Delta x)_i^2] / \text{cost}`: tuning of the moves.

Step sizes, trajectory lengths and the probabilities of the moves, on states drawn from a population.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import HamiltonianMove, Move, adapted
from pyro_sb.ops.student_mixture import StudentMixture

__all__ = [
    "ChainStates",
    "Tuned",
    "fit_step",
    "local_floor",
    "share_moves",
    "trajectory_range",
    "tune",
    "tune_from",
    "tune_local",
]

ADAPT_STEPS, MEASURE_STEPS = 15, 6


class ChainStates(NamedTuple):
    """States that the tuning runs on, ``(C, d)``, and their log density ``(C,)``."""

    x: Tensor
    log_density: Tensor


class Tuned(NamedTuple):
    """A tuned move, its acceptance rate, and its efficiency: expected squared jump per density evaluation."""

    move: Move
    acceptance: float
    efficiency: float


def fit_step(move: Move, log_joint: LogJoint, batch: ChainStates) -> ChainStates:
    r"""Fit a move's step size to its target acceptance, in place, by Robbins and Monro on its logarithm.

    .. math:: \log h \mathrel{+}= 4 n^{-0.6} (\bar\alpha - \alpha^*)

    Args:
        move: The move; nothing is done if it has no step size.
        log_joint: Target.
        batch: States to run on, near the target's law.

    Returns:
        The states that it left.
    """
    if not bool(torch.as_tensor(move.step_size > 0.0).all()):
        return batch
    for count in range(1, ADAPT_STEPS + 1):
        moved = move.step(log_joint, *batch)
        batch = ChainStates(moved.x, moved.log_density)
        move.step_size = adapted(move.step_size, moved.accept_prob, move.target_accept, 4.0 * count**-0.6)
    return batch


def tune(
    move: Move,
    log_joint: LogJoint,
    batch: ChainStates,
    metric_cholesky: Tensor,
    radius: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tuned, ChainStates]:
    r"""Fit a move's step size to its target acceptance, then measure its efficiency.

    The step size is that of `fit_step`. The efficiency is the expected squared jump of the
    slowest coordinate in the metric, :math:`\min_i E[(L^{-1} \Delta x)_i^2]`, over the move's cost in density
    evaluations (a gradient counts 2.5). With a ``radius`` it is the expected squared jump of that, in its variances,
    where that is smaller: trajectories of half a period carry each coordinate to its mirror image, and the radius
    nowhere (the idea of ChEES).

    Args:
        move: The move; its ``step_size`` is set in place.
        log_joint: Target.
        batch: States to run on, near the target's law.
        metric_cholesky: Factor L of the metric. Shape ``(d, d)``.
        radius: A function of points, ``(C, d)`` to ``(C,)``, such as the squared distance from a centre.

    Returns:
        The tuned move with its figures, and the batch that it left.
    """
    batch = fit_step(move, log_joint, batch)
    acceptance, jump, change, spread = 0.0, torch.zeros_like(batch.x[0]), 0.0, 0.0
    for _ in range(MEASURE_STEPS):
        moved = move.step(log_joint, *batch)
        white = torch.linalg.solve_triangular(metric_cholesky, (moved.x - batch.x).T, upper=False)
        jump += white.square().mean(1) / MEASURE_STEPS
        acceptance += float(moved.accept_prob.mean()) / MEASURE_STEPS
        if radius is not None:
            before, after = radius(batch.x), radius(moved.x)
            change, spread = change + float((after - before).square().mean()), spread + float(after.var())
        batch = ChainStates(moved.x, moved.log_density)
    least = float(jump.min()) if radius is None else min(float(jump.min()), change / max(spread, 1e-300))
    return Tuned(move, acceptance, least / move.cost), batch


def share_moves(tuned: dict[str, Tuned], min_bridge_probability: float) -> dict[str, float]:
    r"""Probabilities of the moves: floors for all, and the rest to the most efficient.

    The bridge's local move keeps ``min_bridge_probability``, the index move .1; floors that do not fit beside the
    bridge's shrink. The local move's floor falls from .5 where the index move accepts under .3, over .2 at .7, to .05
    above .92: the local move guards the tails that proposals from a mixture reach seldom.

    Args:
        tuned: Moves by role: ``"bridge"``, ``"index"`` and, unless left out, ``"local"``.
        min_bridge_probability: Floor of the bridge's local move, in [0, 1).

    Example:
        >>> move = Tuned(None, 0.9, 1.0)
        >>> share_moves({"bridge": move, "index": move._replace(efficiency=2.0)}, 0.1)
        {'bridge': 0.1, 'index': 0.9}
    """
    floors = {"bridge": min_bridge_probability, "index": 0.1, "local": local_floor(tuned["index"].acceptance)}
    floors = {role: floors[role] for role in tuned}
    others = sum(value for role, value in floors.items() if role != "bridge")
    scale = min(1.0, (1.0 - min_bridge_probability) / others)
    shares = {role: value if role == "bridge" else value * scale for role, value in floors.items()}
    winner = max(tuned, key=lambda role: tuned[role].efficiency)
    shares[winner] += 1.0 - sum(shares.values())
    return shares


def local_floor(acceptance: float) -> float:
    """Floor of the local move's probability, given the index move's acceptance: piecewise linear, from .5 to .05."""
    knots = ((0.0, 0.5), (0.3, 0.5), (0.7, 0.2), (0.85, 0.1), (0.92, 0.05), (1.0, 0.05))
    for (left, high), (right, low) in zip(knots, knots[1:], strict=False):
        if acceptance <= right:
            return high + (low - high) * (acceptance - left) / (right - left)
    return knots[-1][1]


def trajectory_range(fit: float) -> tuple[int, float]:
    """Largest number of leapfrog steps and spread of step sizes, given the index move's acceptance.

    Where the mixture fits, the local move is but a guard. Where it does not, there are regions much narrower than its
    components, which only small steps leave.
    """
    if fit > 0.85:
        return 4, 1.5
    return (8, 10.0) if fit > 0.6 else (32, 30.0)


def tune_local(
    core: StudentMixture, log_joint: LogJoint, batch: ChainStates, scale: Tensor, max_steps: int, spread: float
) -> tuple[Tuned, ChainStates]:
    """HMC whose number of leapfrog steps doubles while the efficiency rises."""
    first = HamiltonianMove(core, 1 if max_steps == 1 else 2, 0.5, spread)
    return tune_from(first, log_joint, batch, scale, max_steps)


def tune_from(
    first: HamiltonianMove,
    log_joint: LogJoint,
    batch: ChainStates,
    scale: Tensor,
    max_steps: int,
    radius: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tuned, ChainStates]:
    """The same from given trajectories on, with a ``radius`` as in `tune`."""
    best: Tuned | None = None
    num_steps, step_size = first.num_steps, first.step_size
    while num_steps <= max_steps:
        move = HamiltonianMove(first.mixture, num_steps, step_size, first.spread)
        candidate, batch = tune(move, log_joint, batch, scale, radius)
        if best is not None and candidate.efficiency <= best.efficiency:
            break
        best, step_size = candidate, candidate.move.step_size
        num_steps *= 2
    assert best is not None
    return best, batch
