r"""Ascents of many starts without second derivatives, :math:`x \mathrel{+}= s\,B\,\nabla\log p`, B by L-BFGS."""

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint

__all__ = ["quasi_newton_ascent"]

MEMORY = 10
LENGTHS = (4.0, 1.0, 0.3, 0.1, 0.01)
ARMIJO = 1e-4


def quasi_newton_ascent(
    log_joint: LogJoint, starts: Tensor, units: Tensor, max_iter: int = 150, gain: float = 1e-3
) -> tuple[Tensor, Tensor]:
    r"""Limited-memory BFGS ascent of a batch, near maxima where there are any: one gradient a start and step.

    It ends where a step promises less than ``gain`` nats, or no length of it rises. Whether the end is a maximum is for
    Newton's method to say, from there.

    Args:
        log_joint: Target.
        starts: Where its log density is finite. Shape ``(S, d)``.
        units: Lengths over which the target varies along each axis. Shape ``(S, d)``.
        max_iter: Largest number of steps.
        gain: In nats.

    Returns:
        Ends ``(S, d)`` and the log densities there ``(S,)``.

    References:
        Numerical Optimization (Nocedal and Wright, 2006), algorithm 7.4.
    """
    x = starts.clone()
    value, grad = log_joint.value_and_grad(x)
    slopes = units * grad  # all is done in coordinates of unit curvature
    memory: list[tuple[Tensor, Tensor]] = []  # steps and changes of slope, of all starts
    active = torch.isfinite(value) & torch.isfinite(slopes).all(-1)
    lengths = torch.tensor(LENGTHS, dtype=x.dtype, device=x.device)
    for _ in range(max_iter):
        direction = _direction(slopes, memory)
        promise = (direction * slopes).sum(-1)
        lost = active & ~(promise > 0)  # the memory is of another region
        direction[lost], promise[lost] = slopes[lost], slopes[lost].square().sum(-1)
        if not memory:
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1.0)
        active &= promise > gain
        rows = active.nonzero().squeeze(-1)
        if not len(rows):
            break
        trials = x[rows, None] + lengths[:, None] * (units * direction)[rows, None]
        found = log_joint.log_prob(trials.flatten(0, 1)).view(len(rows), -1).nan_to_num(nan=-torch.inf)
        best, index = found.max(-1)
        rose = best > value[rows] + ARMIJO * lengths[index] * promise[rows]
        active[rows[~rose]] = False
        rows, moved = rows[rose], trials[rose, index[rose]]
        if not len(rows):
            break
        step, change = torch.zeros_like(x), torch.zeros_like(x)
        step[rows] = (moved - x[rows]) / units[rows]
        x[rows] = moved
        value[rows], fresh = log_joint.value_and_grad(moved)
        change[rows] = slopes[rows] - units[rows] * fresh
        slopes[rows] = units[rows] * fresh
        memory = [*memory[1 - MEMORY :], (step, change)]
    return x, value


def _direction(slopes: Tensor, memory: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The two loops: inverse curvature times slopes, from steps and changes; pairs without curvature do not count."""
    q, parts = slopes.clone(), []
    for step, change in reversed(memory):
        curvature = (step * change).sum(-1)
        usable = curvature > 1e-10 * change.square().sum(-1)
        rho = torch.where(usable, 1.0 / curvature.where(usable, torch.ones_like(curvature)), 0.0)
        alpha = rho * (step * q).sum(-1)
        q = q - alpha[:, None] * change
        parts.append((step, change, rho, alpha))
    if memory:
        step, change = memory[-1]
        size = (step * change).sum(-1) / change.square().sum(-1).clamp_min(1e-300)
        q = torch.where(size > 0, size, torch.ones_like(size))[:, None] * q
    for step, change, rho, alpha in reversed(parts):
        q = q + (alpha - rho * (change * q).sum(-1))[:, None] * step
    return q
