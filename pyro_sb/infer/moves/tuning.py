"""Step sizes, trajectory lengths and the mixture of moves, tuned on a population by expected squared jump per cost."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import Move

ADAPT_STEPS, MEASURE_STEPS = 15, 6


class Batch(NamedTuple):
    """States that the tuning runs on, ``(C, d)``, and their log density ``(C,)``."""

    x: Tensor
    log_density: Tensor


class Tuned(NamedTuple):
    """A tuned move, its acceptance rate, and its efficiency: expected squared jump per density evaluation."""

    move: Move
    acceptance: float
    efficiency: float


def tune(move: Move, log_joint: LogJoint, batch: Batch, metric_cholesky: Tensor) -> tuple[Tuned, Batch]:
    r"""Fit a move's step size to its target acceptance, then measure its efficiency.

    The step size follows Robbins and Monro on its logarithm. The efficiency is the expected squared jump of the
    slowest coordinate in the metric, :math:`\min_i E[(L^{-1} \Delta x)_i^2]`, over the move's cost in density
    evaluations (a gradient counts 2.5).

    Args:
        move: The move; its ``step_size`` is set in place.
        log_joint: Target.
        batch: States to run on, near the target's law.
        metric_cholesky: Factor L of the metric. Shape ``(d, d)``.

    Returns:
        The tuned move with its figures, and the batch that it left.
    """
    if move.step_size > 0.0:
        for count in range(1, ADAPT_STEPS + 1):
            moved = move.step(log_joint, *batch)
            batch = Batch(moved.x, moved.log_density)
            error = float(moved.accept_prob.mean()) - move.target_accept
            move.step_size *= math.exp(4.0 * count**-0.6 * error)
    acceptance, jump = 0.0, torch.zeros_like(batch.x[0])
    for _ in range(MEASURE_STEPS):
        moved = move.step(log_joint, *batch)
        white = torch.linalg.solve_triangular(metric_cholesky, (moved.x - batch.x).T, upper=False)
        jump += white.square().mean(1) / MEASURE_STEPS
        acceptance += float(moved.accept_prob.mean()) / MEASURE_STEPS
        batch = Batch(moved.x, moved.log_density)
    return Tuned(move, acceptance, float(jump.min()) / move.cost), batch


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
